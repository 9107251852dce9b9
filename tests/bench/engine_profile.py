"""Where a decoding step of the continuous engine on a CPU spends its time, and what the machine could do.

    python -m tests.bench.engine_profile [--model smollm2-135m-instruct] [--rows 16] [--context 100]
                                         [--dtype float32] [--steps 60] [--json] [--save]

The engine is a worker's own: assembled from a configuration, its thread and its team bound to cores. ``--rows``
sequences decode greedily, their contexts ``--context`` tokens halfway. Every other step is measured undisturbed. In the
steps between, clocks stand around what a step calls:

linear layers      oneDNN's products, by inputs x outputs; the largest is the layer of the logits
attention          the compiled kernel that reads keys and values from blocks
fused kernels      norms, rotary positions and writing, gates
choosing           from logits to token numbers on the host
rest of forward    what is left of the model's forward: Python, embedding, small operations of torch
rest of step       what is left of the step: scheduling, tables, events

What the clocks cost shows in the two kinds of steps beside each other. At the end torch's profiler sees a few steps:
it slows them down more, and names torch's own operations. Ceilings are measured in the same run, before the steps and
after them: bytes copied and read a second by all cores, operations a second of a large product. ``ratio`` compares
undisturbed steps with the time in which the cores read the step's bytes (weights, keys and values) once: below 1,
larger is better. ``others_share`` says what part of the cores others had meanwhile: figures of a busy machine mean
little.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slipstream_server.inference.worker_process import UNLESS_SET

os.environ.update({**UNLESS_SET, **os.environ})  # as the service does for its workers; before torch is imported

import msgspec
from rich.console import Console
from rich.table import Table
from tests.bench.ceilings import Ceilings, ceilings
from tests.bench.gpu_engine import token_bytes, weight_bytes
from tests.bench.others import Moment, wait_for_quiet
from tests.bench.report import Comparison, keep
from tests.bench.step_clocks import TimedStep, clocks, fused_of, median_ms, parts_of, products_of
from torch.profiler import ProfilerActivity, profile

from slipstream_server.inference.engine.assembly import assemble
from slipstream_server.inference.engine.continuous import ContinuousEngine
from slipstream_server.inference.engine.cores import bind_team, go_anywhere
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.generation import Failed, GenerationRequest, Sampling, Stopping, Tokens
from slipstream_server.inference.worker_config import WorkerConfig, decode_config
from slipstream_server.models.sources import resolve

SEED = 20264
WARM_UP_STEPS = 6
PROFILED_STEPS = 8
STEPS_PER_RUN = 10
MOST_OPERATIONS = 12
WAIT_S = 60.0
MOST_ROWS = 128
# A step has room for so many tokens of prompts beside that many rows.
LEAST_STEP_TOKENS = 128


class Driven:
    """The engine of a worker, stepped by hand; ``num_rows`` requests that never end by themselves."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.num_rows = arguments.rows
        # Halfway through the measured steps contexts are as long as was asked for.
        self._num_prompt_tokens = arguments.context - arguments.steps - WARM_UP_STEPS
        num_prompt_steps = arguments.rows * (1 + self._num_prompt_tokens // LEAST_STEP_TOKENS)
        num_steps = num_prompt_steps + WARM_UP_STEPS + 2 * arguments.steps + PROFILED_STEPS
        self._num_new = num_steps + 2
        # As a worker does: another thread loads, so that the one that computes can be bound with its team.
        with ThreadPoolExecutor(1) as background:
            config = _config(arguments, self.num_rows * (self._num_prompt_tokens + self._num_new + BLOCK_TOKENS))
            engine, self.ready = background.submit(assemble, config, lambda _fraction, _stage: None, _nothing).result()
        if not isinstance(engine, ContinuousEngine) or self.ready.device != "cpu":
            raise SystemExit(
                f"{self.ready.batching} batches on {self.ready.device}: continuous ones on a CPU are meant"
            )
        bind_team()
        self._engine = engine
        self.model = engine._model.traits.model

    def start(self) -> None:
        """All rows at once, with random prompts, until all of them decode."""
        numbers = random.Random(SEED)
        for number in range(self.num_rows):
            prompt = tuple(numbers.randrange(3, self.model.config.vocab_size) for _ in range(self._num_prompt_tokens))
            self._engine.submit(
                GenerationRequest(
                    id=number,
                    prompt_token_ids=prompt,
                    sampling=Sampling(),
                    stopping=Stopping(max_new_tokens=self._num_new),
                )
            )
        while self.step() < self.num_rows:
            pass
        for _ in range(WARM_UP_STEPS):
            self.decoding_step_s()

    def step(self) -> int:
        """How many rows got a token; a failure ends the bench."""
        events = self._engine.step()
        for event in events:
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
        return sum(isinstance(event, Tokens) for event in events)

    def decoding_step_s(self) -> float:
        """Seconds of a step in which every row decodes."""
        start_s = time.perf_counter()
        num_tokens = self.step()
        time_s = time.perf_counter() - start_s
        if num_tokens != self.num_rows:
            raise RuntimeError(f"{num_tokens} of {self.num_rows} rows got a token")
        return time_s


def main() -> int:
    arguments = _arguments()
    line = profiled(arguments)
    if arguments.json:
        print(json.dumps(line), flush=True)
    else:
        print_tables(line)
    if arguments.save:
        keep(line)
    return 0


def profiled(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the run found, as a line of results."""
    driven = Driven(arguments)
    before = ceilings(driven.model.dtype)
    driven.start()
    wait_for_quiet(WAIT_S)
    start = Moment.now()
    plain_s: list[float] = []
    timed: list[TimedStep] = []
    for _ in range(arguments.steps):
        plain_s.append(driven.decoding_step_s())
        timed.append(_timed_step(driven))
    share_of_others = start.share_of_others()
    operations, profiled_s = _by_operation(driven)
    best = _best(before, ceilings(driven.model.dtype))
    go_anywhere()  # whoever is bound counts one core
    return _line(arguments, driven, best, plain_s, timed, operations, profiled_s, share_of_others)


def _timed_step(driven: Driven) -> TimedStep:
    found = TimedStep()
    with clocks(found):
        found.total_s = driven.decoding_step_s()
    return found


def _by_operation(driven: Driven) -> tuple[list[dict[str, Any]], float]:
    """Torch's operations by their own time in a step, and the median of the steps that its profiler saw."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps_s = [driven.decoding_step_s() for _ in range(PROFILED_STEPS)]
    found = sorted(profiler.key_averages(), key=lambda each: each.self_cpu_time_total, reverse=True)
    return [
        {
            "operation": each.key,
            "ms": round(each.self_cpu_time_total / 1000 / PROFILED_STEPS, 3),
            "calls": round(each.count / PROFILED_STEPS, 1),
        }
        for each in found[:MOST_OPERATIONS]
    ], statistics.median(steps_s)


def _line(
    arguments: argparse.Namespace,
    driven: Driven,
    best: Ceilings,
    plain_s: Sequence[float],
    timed: Sequence[TimedStep],
    operations: list[dict[str, Any]],
    profiled_s: float,
    share_of_others: float,
) -> dict[str, Any]:
    kv_bytes = arguments.rows * arguments.context * token_bytes(driven.model)
    step_bytes = weight_bytes(driven.model) + kv_bytes
    products = products_of(timed, arguments.rows, driven.model.dtype.itemsize)
    linear_s = sum(each["ms"] for each in products) / 1000
    num_operations = sum(2 * arguments.rows * each["calls"] * each["inputs"] * each["outputs"] for each in products)
    floor_s = step_bytes / best.read_bytes_per_s
    groups = [plain_s[start : start + STEPS_PER_RUN] for start in range(0, len(plain_s), STEPS_PER_RUN)]
    return Comparison(
        bench="engine_profile",
        workload=f"step_{arguments.rows}_rows_{arguments.context}",
        side="continuous",
        versus="floor",
        ours=[1 / statistics.median(group) for group in groups],
        theirs=[1 / floor_s] * len(groups),
        unit="steps/s",
        seed=SEED,
        device="cpu",
        dtype=driven.ready.dtype,
        extra={
            "model": arguments.model,
            "step_ms": median_ms(plain_s),
            "step_ms_p10_p90": [round(1000 * each, 2) for each in _deciles(plain_s)],
            "step_with_clocks_ms": median_ms([each.total_s for each in timed]),
            "step_with_profiler_ms": round(1000 * profiled_s, 3),
            "parts": parts_of(timed),
            "fused": fused_of(timed),
            "products": products,
            "operations_in_profiler": operations,
            "weight_bytes": weight_bytes(driven.model),
            "kv_bytes": kv_bytes,
            "copy_gb_per_s": round(best.copied_bytes_per_s / 1e9, 2),
            "read_gb_per_s": round(best.read_bytes_per_s / 1e9, 2),
            "linear_gb_per_s": round(weight_bytes(driven.model) / linear_s / 1e9, 2),
            "matmul_gflop_per_s": round(best.operations_per_s / 1e9, 1),
            "linear_gflop_per_s": round(num_operations / linear_s / 1e9, 1),
            "floor_of_bytes_ms": round(1000 * floor_s, 2),
            "floor_of_operations_ms": round(1000 * num_operations / best.operations_per_s, 2),
            "others_share": round(share_of_others, 3),
            "settings": driven.ready.settings,
        },
    ).line()


def _deciles(seconds: Sequence[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(seconds, n=10)
    return cuts[0], cuts[-1]


def _best(first: Ceilings, second: Ceilings) -> Ceilings:
    return Ceilings(
        copied_bytes_per_s=max(first.copied_bytes_per_s, second.copied_bytes_per_s),
        read_bytes_per_s=max(first.read_bytes_per_s, second.read_bytes_per_s),
        operations_per_s=max(first.operations_per_s, second.operations_per_s),
    )


def print_tables(line: dict[str, Any]) -> None:
    """The step's parts, its products, and what they are held against."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    parts = Table(title=f"{line['workload']}, {line['dtype']}: {line['step_ms']:.1f} ms undisturbed")
    for name in ("part", "ms", "share", "calls"):
        parts.add_column(name, justify="left" if name == "part" else "right")
    for name, part in line["parts"].items():
        parts.add_row(name, f"{part['ms']:.2f}", f"{part['share']:.0%}", str(part["calls"] or ""))
    parts.add_row("step with clocks", f"{line['step_with_clocks_ms']:.2f}", "100%", "")
    console.print(parts)
    products = Table(title="linear layers")
    for name in ("inputs x outputs", "calls", "ms", "GB/s", "GFLOP/s"):
        products.add_column(name, justify="right")
    for each in line["products"]:
        products.add_row(
            f"{each['inputs']} x {each['outputs']}", str(each["calls"]), f"{each['ms']:.2f}",
            f"{each['gb_per_s']:.1f}", f"{each['gflop_per_s']:.0f}",
        )  # fmt: skip
    products.add_row(
        "together", "", f"{line['parts']['linear layers']['ms']:.2f}",
        f"{line['linear_gb_per_s']:.1f}", f"{line['linear_gflop_per_s']:.0f}",
    )  # fmt: skip
    products.add_row("reading alone", "", "", f"{line['read_gb_per_s']:.1f}", "")
    products.add_row("copying", "", "", f"{line['copy_gb_per_s']:.1f}", "")
    products.add_row("a large product", "", "", "", f"{line['matmul_gflop_per_s']:.0f}")
    console.print(products)
    seen = Table(title=f"torch's profiler, whose steps take {line['step_with_profiler_ms']:.1f} ms")
    for name in ("operation", "ms", "calls"):
        seen.add_column(name, justify="left" if name == "operation" else "right")
    for each in line["operations_in_profiler"]:
        seen.add_row(each["operation"], f"{each['ms']:.2f}", f"{each['calls']:g}")
    console.print(seen)
    console.print(
        f"{(line['weight_bytes'] + line['kv_bytes']) / 1e6:.0f} MB a step: {line['floor_of_bytes_ms']:.1f} ms to read,"
        f" {line['floor_of_operations_ms']:.1f} ms of operations at best; the step takes {line['step_ms']:.1f} ms."
        f" Others had {line['others_share']:.0%} of the cores."
    )


def _config(arguments: argparse.Namespace, num_kv_tokens: int) -> WorkerConfig:
    values = {
        "model_folder": str(resolve(arguments.model).folder),
        "load": {"dtype": arguments.dtype, "device": "cpu"},
        "engine": "continuous",
        "max_batch_size": arguments.rows,
        "max_batch_tokens": num_kv_tokens,
    }
    return decode_config(msgspec.json.encode(values).decode())


def _nothing() -> None:
    pass


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=100, help="tokens of each row halfway through the steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=60, help="undisturbed ones, and as many with clocks")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of tables")
    parser.add_argument("--save", action="store_true", help="keep the lines in tests/bench/results")
    arguments = parser.parse_args()
    if not 1 <= arguments.rows <= MOST_ROWS or arguments.steps < STEPS_PER_RUN:
        parser.error(f"--rows is 1 to {MOST_ROWS}, --steps at least {STEPS_PER_RUN}")
    if arguments.context < (least := arguments.steps + WARM_UP_STEPS + 1):
        parser.error(f"--context is at least {least}: so many tokens come before and during {arguments.steps} steps")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
