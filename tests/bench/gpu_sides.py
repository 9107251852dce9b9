"""What the GPU bench compares: the continuous engine, static ``generate`` and Transformers' continuous batching, each
with a model of its own in this process.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.bench.engine.sides.transformers_cb import next_result
from transformers import ContinuousBatchingConfig, GenerationConfig

from slipstream_server.inference.engine.continuous import ContinuousEngine
from slipstream_server.inference.engine.continuous_scheduler import StepLimits
from slipstream_server.inference.engine.decode_graphs import CudaRecorder
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.engine.sequences import blocks_for
from slipstream_server.inference.generation import Failed, Finished, GenerationRequest, Sampling, Stopping, Tokens

GENERATE_BATCH = 16
MAX_ROWS = 64
PAGE_TOKENS = 256
STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt, and how much is to follow it."""

    prompt: tuple[int, ...]
    max_new_tokens: int


class Ours:
    """The continuous engine, stepped by hand."""

    def __init__(self, model: Any, *, max_rows: int, num_tokens: int) -> None:
        self._packed = PackedModel(Traits.of(model))
        device = self._packed.traits.device
        limits = StepLimits(max_running=max_rows, max_step_tokens=STEP_TOKENS)
        self._engine = ContinuousEngine(
            self._packed, limits, blocks_for(num_tokens), prefix_caching=False, runs_ahead=True
        )
        self.is_recorded = device.type == "cuda" and self._packed.record_decoding(CudaRecorder(device), max_rows)
        self._ids = itertools.count(1)

    def submit(self, job: Job) -> None:
        self._engine.submit(
            GenerationRequest(
                id=next(self._ids),
                prompt_token_ids=job.prompt,
                sampling=Sampling(),
                stopping=Stopping(max_new_tokens=job.max_new_tokens),
            )
        )

    def step(self) -> tuple[int, int]:
        """Tokens that came and requests that ended; a failure ends the bench."""
        num_tokens = num_ended = 0
        for event in self._engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Tokens):
                num_tokens += len(event.token_ids)
            num_ended += isinstance(event, Finished)
        return num_tokens, num_ended

    def run(self, jobs: Sequence[Job]) -> int:
        """All jobs at once; how many tokens came."""
        for job in jobs:
            self.submit(job)
        total = ended = 0
        while ended < len(jobs):
            num_tokens, num_ended = self.step()
            total, ended = total + num_tokens, ended + num_ended
        return total


class StaticGenerate:
    """``generate`` on left-padded batches; only tokens that were asked for count."""

    def __init__(self, model: Any) -> None:
        self._model = model
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def run(self, jobs: Sequence[Job]) -> int:
        for start in range(0, len(jobs), GENERATE_BATCH):
            batch = jobs[start : start + GENERATE_BATCH]
            width = max(len(job.prompt) for job in batch)
            ids = torch.tensor([[0] * (width - len(job.prompt)) + list(job.prompt) for job in batch])
            mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
            with torch.inference_mode():
                self._model.generate(
                    input_ids=ids.to(self._model.device),
                    attention_mask=mask.to(self._model.device),
                    max_new_tokens=max(job.max_new_tokens for job in batch),
                )
        return sum(job.max_new_tokens for job in jobs)


class TransformersBatching:
    """Transformers' own continuous batching with its own settings, its manager kept from run to run.

    But its cache is as large as MAX_ROWS rows of two pages (no job needs more than one): left alone it would take most
    of the device, on which our side has to live too.
    """

    def __init__(self, model: Any) -> None:
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS, num_blocks=2 * MAX_ROWS, max_requests_per_batch=MAX_ROWS
            ),
        )
        self._manager.start()

    def run(self, jobs: Sequence[Job]) -> int:
        for job in jobs:
            self._manager.add_request(list(job.prompt), max_new_tokens=job.max_new_tokens, eos_token_id=-1)
        return sum(len(next_result(self._manager).generated_tokens) for _ in jobs)

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)
