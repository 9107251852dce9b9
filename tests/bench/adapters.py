"""Adapters in the padded engine, without the service around it: what they cost, and what they do not.

    python -m tests.bench.adapters [--model NAME] [--pairs 7] [--targets attention|all] [--only NAME] [--save]

base_only       16 requests for the base, on an engine that holds adapters, against one that knows none
one_adapter     16 requests for one adapter, against 16 for the base
mixed_8         16 requests for 8 adapters in turn, against one adapter
mixed_8_peft    the same, against PEFT's own mixed batch (adapter_names)
turns_16        16 adapters over 8 slots, one request after the other: time to the first token, against one that stays

Rates are output tokens/s, prompts of 16 to 128 tokens, ``--new-tokens`` each; ``load_ms`` is what the first use of an
adapter takes, file and all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.bench.report import Comparison, emit, interleaved

from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packing import pack_linears
from slipstream_server.inference.engine.padded import PaddedEngine
from slipstream_server.inference.engine.scheduler import BatchLimits
from slipstream_server.inference.generation import (
    AdapterPin,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
    Stopping,
    Tokens,
)
from slipstream_server.models.loading import LoadedModel, load_model
from slipstream_server.models.sources import resolve

SEED = 20261
NUM_ROWS, NUM_SLOTS, NUM_ADAPTERS, RANK = 16, 8, 16, 16
TARGETS = {"attention": ["q_proj", "v_proj"], "all": "all-linear"}
LIMITS = BatchLimits(max_batch_size=NUM_ROWS, max_queue_delay_ms=0, max_batch_adapters=NUM_SLOTS)

_ids = itertools.count(1)


def save_adapters(model: Any, folder: Path, targets: Sequence[str] | str) -> list[AdapterPin]:
    """Random adapters that PEFT has written."""
    torch.manual_seed(SEED)
    config = LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    pins = []
    for number in range(NUM_ADAPTERS):
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        place = folder / str(number)
        adapted.save_pretrained(str(place), save_embedding_layers=False)
        pins.append(
            AdapterPin(version=f"adapters/bench/versions/v{number}", digest=f"{number:064x}", folder=str(place))
        )
    adapted.unload()
    return pins


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    chance = random.Random(SEED)
    return [tuple(chance.randrange(3, vocab_size) for _ in range(chance.randint(16, 128))) for _ in range(NUM_ROWS)]


def request(prompt: tuple[int, ...], adapter: AdapterPin | None, new_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        id=next(_ids),
        prompt_token_ids=prompt,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=new_tokens),
        adapter=adapter,
    )


def rate(engine: PaddedEngine, requests: Sequence[GenerationRequest]) -> float:
    """Output tokens per second for all requests at once."""
    start_s = time.perf_counter()
    for each in requests:
        engine.submit(each)
    num_tokens = sum(len(event.token_ids) for event in _run(engine, len(requests)) if isinstance(event, Tokens))
    return num_tokens / (time.perf_counter() - start_s)


def first_token_s(engine: PaddedEngine, each: GenerationRequest) -> float:
    """From submission to the end of a request for one token."""
    start_s = time.perf_counter()
    engine.submit(each)
    _run(engine, 1)
    return time.perf_counter() - start_s


def _run(engine: PaddedEngine, num_requests: int) -> list[Any]:
    events: list[Any] = []
    while num_requests:
        new = engine.step()
        failed = [event for event in new if isinstance(event, Failed)]
        assert not failed, failed
        num_requests -= sum(isinstance(event, Finished) for event in new)
        events += new
    return events


def peft_rate(adapted: Any, rows: Sequence[tuple[int, ...]], names: Sequence[str], new_tokens: int) -> float:
    """The same rows through PEFT's mixed batch: left-padded, one ``generate``."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    start_s = time.perf_counter()
    with torch.inference_mode():
        adapted.generate(
            input_ids=ids.to(adapted.device), attention_mask=mask.to(adapted.device), adapter_names=list(names),
            do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
    return len(rows) * new_tokens / (time.perf_counter() - start_s)


def _as_async(run: Callable[[], float]) -> Callable[[], Awaitable[float]]:
    async def wrapped() -> float:
        return run()

    return wrapped


class Bench:
    """One model, an engine with adapters and one without, on the same weights."""

    def __init__(self, loaded: LoadedModel, pins: list[AdapterPin], arguments: argparse.Namespace) -> None:
        self.pins = pins
        self.arguments = arguments
        self.loaded = loaded
        self.rows = prompts(loaded.model.config.vocab_size)
        self.plain = PaddedEngine(loaded.model, LIMITS)
        slots = LoraSlots(loaded.model, num_slots=NUM_SLOTS, max_rank=RANK)
        self.adapted = PaddedEngine(loaded.model, LIMITS, slots=slots)
        first_token_s(self.plain, request(self.rows[0], None, 1))
        loads = [self._first_token_s(pin) for pin in pins[:NUM_SLOTS]]
        again = [self._first_token_s(pin) for pin in pins[:NUM_SLOTS]]
        self.load_ms = round(1000 * (statistics.median(loads[1:]) - statistics.median(again)), 1)
        self.applied_us = round(1e6 * self._base_step_s(slots), 2)

    def _base_step_s(self, slots: LoraSlots, calls: int = 10_000) -> float:
        """What a step of base rows alone pays for adapters being there at all."""
        rows = [Row(each, 0, np.array(each.prompt_token_ids)) for each in self.requests(None)]
        start_s = time.perf_counter()
        for _ in range(calls):
            with slots.applied(rows):
                pass
        return (time.perf_counter() - start_s) / calls

    def requests(self, *pins: AdapterPin | None) -> list[GenerationRequest]:
        return [
            request(row, pin, self.arguments.new_tokens)
            for row, pin in zip(self.rows, itertools.cycle(pins), strict=False)
        ]

    async def compare(self, workload: str, versus: str, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
        if self.arguments.only in (None, workload):
            rates = await interleaved(_as_async(ours), _as_async(theirs), pairs=self.arguments.pairs)
            self.emit(workload, versus, *rates, unit="tokens/s")

    def emit(
        self, workload: str, versus: str, ours: Sequence[float], theirs: Sequence[float], unit: str, **extra: Any
    ) -> None:
        facts = {"model": self.arguments.model, "targets": self.arguments.targets, "rank": RANK}
        facts |= {"load_ms": self.load_ms, "applied_us": self.applied_us, "threads": torch.get_num_threads()}
        line = Comparison(
            bench="adapters",
            workload=workload,
            side="padded",
            versus=versus,
            ours=ours,
            theirs=theirs,
            unit=unit,
            seed=SEED,
            device=str(self.loaded.device),
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            extra={**facts, **extra},
        ).line()
        emit(line, save=self.arguments.save)

    async def run(self) -> None:
        """Every workload but PEFT's, which changes the model."""
        base = lambda: rate(self.plain, self.requests(None))  # noqa: E731
        one = lambda: rate(self.adapted, self.requests(self.pins[0]))  # noqa: E731
        mixed = lambda: rate(self.adapted, self.requests(*self.pins[:NUM_SLOTS]))  # noqa: E731
        await self.compare("base_only", "base_without_adapters", lambda: rate(self.adapted, self.requests(None)), base)
        await self.compare("one_adapter", "base", one, base)
        await self.compare("mixed_8", "one_adapter", mixed, one)
        turns = itertools.cycle(self.pins)
        await self.compare(
            "turns_16",
            "one_adapter",
            lambda: 1 / statistics.median(self._first_token_s(next(turns)) for _ in range(NUM_ADAPTERS)),
            lambda: 1 / statistics.median(self._first_token_s(self.pins[0]) for _ in range(NUM_ADAPTERS)),
        )
        if self.arguments.only in (None, "mixed_8_peft"):
            self.run_peft()

    def run_peft(self) -> None:
        """Against PEFT's own mixed batch; not interleaved, because its layers stay on the model."""
        ours = [rate(self.adapted, self.requests(*self.pins[:NUM_SLOTS])) for _ in range(1 + self.arguments.pairs)][1:]
        adapted = PeftModel.from_pretrained(self.loaded.model, self.pins[0].folder, adapter_name="0").eval()
        for number in range(1, NUM_SLOTS):
            adapted.load_adapter(self.pins[number].folder, adapter_name=str(number))
        names = [str(number % NUM_SLOTS) for number in range(NUM_ROWS)]
        new_tokens = self.arguments.new_tokens
        theirs = [peft_rate(adapted, self.rows, names, new_tokens) for _ in range(1 + self.arguments.pairs)][1:]
        self.emit("mixed_8_peft", "peft", ours, theirs, "tokens/s", interleaved=False)

    def _first_token_s(self, pin: AdapterPin) -> float:
        return first_token_s(self.adapted, request(self.rows[0], pin, 1))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="attention")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--only", help="one workload")
    parser.add_argument("--save", action="store_true", help="keep the lines in tests/bench/results")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loaded = load_model(resolve(arguments.model).folder)
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as folder:
        pins = save_adapters(loaded.model, Path(folder), TARGETS[arguments.targets])
        if loaded.device.type == "cpu":
            pack_linears(loaded.model, given_alike=True)
        bench = Bench(loaded, pins, arguments)
        await bench.run()


if __name__ == "__main__":
    asyncio.run(main())
