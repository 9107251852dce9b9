"""Drives the continuous scheduler by hand, with rows whose tokens are drawn from a list: no model, no torch."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np

from slipstream_server.inference.engine.continuous_scheduler import (
    PRIORITY_S,
    Chunk,
    ContinuousScheduler,
    Plan,
    StepLimits,
)
from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS, BlockPool
from slipstream_server.inference.engine.sequences import Sequence
from slipstream_server.inference.generation import AdapterPin, GenerationRequest, Sampling, Stopping

_ids = count(1)
ADAPTERS = {name: AdapterPin(version=name, digest=name, folder="") for name in "ab"}


def sequence(
    prompt: Any, max_new_tokens: int = 3, *, at_s: float = 0.0, adapter: str | None = None, **others: Any
) -> Sequence:
    request = GenerationRequest(
        id=next(_ids), prompt_token_ids=tuple(prompt), sampling=Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens), adapter=ADAPTERS[adapter] if adapter else None, **others,
    )  # fmt: skip
    row = Row(request, 0, np.array(request.prompt_token_ids, dtype=np.int64))
    return Sequence(Generation(request, [row]), row, at_s)


def rank(one: Sequence) -> tuple[float, int]:
    return (one.arrival_s + PRIORITY_S * one.row.request.priority, one.row.request.id)


class Written:
    """KV memory that remembers which token of which prefix was written where, as the model would."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}

    def run(self, chunk: Chunk) -> None:
        """Write the chunk's tokens, having read all before them."""
        one = chunk.sequence
        adapter = one.row.request.adapter
        tokens = (*one.row.tokens[: chunk.start + chunk.count].tolist(), *chunk.drafts)
        content = hash(adapter and adapter.digest)
        for position, token in enumerate(tokens):
            place = (one.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
            content = hash((content, token))
            if position >= chunk.start:
                self.places[place] = content
            else:
                assert self.places[place] == content, "a sequence reads what is not its own past"


class Driver:
    """Runs plans as the engine does; every row's next token is a function of its tokens alone."""

    def __init__(self, num_blocks: int, limits: StepLimits, **options: Any) -> None:
        self.limits = limits
        self.pool = BlockPool(num_blocks)
        self.scheduler = ContinuousScheduler(limits, self.pool, **options)
        self.written = Written()
        self.is_admitted: set[int] = set()

    def step(self, num_drafts: int = 0) -> Plan:
        waiting = {id(one) for one in self.scheduler if not one.is_running}
        best = min((one for one in self.scheduler if one.is_running), key=rank, default=None)
        before = None if best is None else (best.num_computed, best.num_tokens)
        plan = self.scheduler.plan(lambda one: guess(one, num_drafts))
        self.scheduler.check_integrity()
        self._check(plan, waiting)
        for chunk in plan.chunks:
            self.written.run(chunk)
        for chunk in plan.chunks:
            self._finish(chunk)
        if best is not None and before is not None:
            assert best.is_running or not best.row.is_live, "the best ranked had to give way"
            assert (best.num_computed, best.num_tokens) > before or not best.row.is_live, "it did not advance"
        assert plan.chunks or not waiting, "somebody waits and nobody runs"
        self.scheduler.check_integrity()
        return plan

    def _check(self, plan: Plan, waiting: set[int]) -> None:
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks), "two chunks of one sequence"
        decoding = sum(chunk.num_tokens for chunk in plan.chunks if is_decode(chunk))
        reading = sum(chunk.num_tokens for chunk in plan.chunks if not is_decode(chunk))
        newcomers = [chunk for chunk in plan.chunks if chunk.sequence in plan.newcomers]
        assert len(newcomers) == len(plan.newcomers), "a newcomer has nothing to do"
        assert decoding + reading <= decoding + max(BLOCK_TOKENS, self.limits.max_step_tokens - decoding)
        assert self.scheduler.num_running <= self.limits.max_running
        for one in plan.newcomers:
            assert id(one) in waiting or one.row.request.id in self.is_admitted
            assert one.num_cached is not None
            assert one.num_cached < one.num_tokens, "nothing is left whose logits could be read"
            self.is_admitted.add(one.row.request.id)
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.num_computed
            assert 0 < chunk.count <= chunk.sequence.num_to_compute
            assert -(-(chunk.start + chunk.num_tokens) // BLOCK_TOKENS) <= len(chunk.sequence.blocks)

    def _finish(self, chunk: Chunk) -> None:
        one = chunk.sequence
        if not chunk.gives_token:
            self.scheduler.commit(chunk)
            return
        num_right = 0
        one.row.append(following(one.row.tokens))
        while num_right < len(chunk.drafts) and one.row.is_live and one.row.tokens[-1] == chunk.drafts[num_right]:
            one.row.append(following(one.row.tokens))
            num_right += 1
        self.scheduler.commit(chunk, num_right)
        if not one.row.is_live:
            self.scheduler.remove(one)

    def drain(self, most_steps: int) -> int:
        steps = 0
        while self.scheduler.has_work:
            assert steps < most_steps, "the scheduler does not come to an end"
            self.step()
            steps += 1
        return steps


def is_decode(chunk: Chunk) -> bool:
    return chunk.count == 1 and chunk.gives_token


def following(tokens: Any) -> int:
    return int(tokens[-3:].sum() + len(tokens)) % 5


def guess(one: Sequence, most: int) -> tuple[int, ...]:
    """Right guesses, but for the last one; none beyond what may be generated."""
    room = min(most, one.row.request.stopping.max_new_tokens - one.row.num_generated - 1)
    tokens = one.row.tokens
    for _ in range(room):
        tokens = np.append(tokens, following(tokens))
    guesses = [int(token) for token in tokens[one.num_tokens :]]
    return (*guesses[:-1], guesses[-1] + 1) if len(guesses) > 1 else tuple(guesses)


def limits(**values: int) -> StepLimits:
    return StepLimits(**{"max_running": 8, "max_step_tokens": 64, **values})
