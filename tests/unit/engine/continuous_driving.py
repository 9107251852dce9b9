"""Drives a continuous engine by hand, on tiny models whose references are kept."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from tests.unit.engine.decoders import build
from tests.unit.engine.driving import Answer, Bench, generate_alone

from slipstream_server.inference.engine.adapters import AdapterSlots
from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.continuous import ContinuousEngine
from slipstream_server.inference.engine.continuous_scheduler import StepLimits
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import GenerationRequest


@cache
def reference(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model that no engine touches, to generate with alone."""
    return build(name, dtype)


@cache
def packed(name: str, dtype: torch.dtype = torch.float64) -> PackedModel:
    """The same model for engines; each new one takes it over."""
    return PackedModel(Traits.of(build(name, dtype)))


@cache
def alone(name: str, prompt: tuple[int, ...], max_new_tokens: int, **settings: Any) -> tuple[int, ...]:
    """What plain ``generate`` answers to the prompt in a call of its own."""
    return tuple(generate_alone(reference(name), prompt, max_new_tokens=max_new_tokens, **settings))


def padded_bench() -> Bench:
    """A padded engine of the "llama" above, which has room for everybody."""
    return Bench(reference("llama"), max_batch_size=64, max_batch_tokens=100_000)


class ContinuousBench(Bench):
    """An engine and everything it has said. ``now`` is its clock, which stands still unless moved."""

    engine: Any

    def __init__(
        self,
        model: PackedModel,
        num_blocks: int = 64,
        *,
        slots: AdapterSlots | None = None,
        grammars: Grammars | None = None,
        prefix_caching: bool = True,
        max_draft_tokens: int = 0,
        runs_ahead: bool = False,
        **limits: int,
    ) -> None:
        self.now = time.monotonic()
        self.steps = 0
        self.answers: dict[int, Answer] = {}
        self.engine = ContinuousEngine(
            model,
            StepLimits(**{"max_running": 16, **limits}),
            num_blocks,
            slots=slots,
            grammars=grammars,
            prefix_caching=prefix_caching,
            max_draft_tokens=max_draft_tokens,
            runs_ahead=runs_ahead,
            clock=lambda: self.now,
        )

    @property
    def num_held(self) -> int:
        """Blocks that belong to somebody."""
        return int(self.engine._pool.num_held)

    def run(self, *requests: GenerationRequest, most_steps: int = 2000) -> list[Answer]:
        answers = super().run(*requests, most_steps=self.steps + most_steps)
        assert self.num_held == 0
        return answers
