"""Recorded decoding steps, on a CPU: a stand-in replays by running the step again on the same buffers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench, alone
from tests.unit.engine.decoders import build
from tests.unit.engine.driving import prompts, request

from slipstream_server.inference.engine import gathered_attention
from slipstream_server.inference.engine.decode_graphs import Step, bucket_sizes
from slipstream_server.inference.engine.gpu_memory import GpuMemory
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits


class OnGpuMemory(PackedModel):
    """A model whose KV memory is the one for GPUs."""

    def _new_memory(self, num_blocks: int) -> Any:
        return GpuMemory(self._shapes, num_blocks, self._model.dtype, self._devices, gathered_attention)


class Recorder:
    """Runs the step again where a graph would be replayed, and counts."""

    def __init__(self) -> None:
        self.replayed: list[int] = []

    def __call__(self, step: Step) -> Step:
        def replay() -> torch.Tensor:
            logits_RV = step()
            self.replayed.append(len(logits_RV))
            return logits_RV

        return replay


@cache
def model(name: str) -> PackedModel:
    return OnGpuMemory(Traits.of(build(name, torch.float64)))


@pytest.fixture(autouse=True)
def recordable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "IS_RECORDABLE", True)


def bench_with_recordings(name: str, max_rows: int) -> tuple[ContinuousBench, Recorder]:
    bench = ContinuousBench(model(name), max_running=8)
    recorder = Recorder()
    assert model(name).record_decoding(recorder, max_rows)
    recorder.replayed.clear()
    return bench, recorder


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (16, (1, 2, 4, 8, 16)),
        (20, (1, 2, 4, 8, 16, 20)),
        (64, (1, 2, 4, 8, 16, 24, 32, 48, 64)),
        (100, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)),
    ],
)
def test_sizes_are_close_together_and_end_at_the_most(most: int, sizes: Sequence[int]) -> None:
    assert bucket_sizes(most) == sizes


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_answers_are_those_of_generate_alone(name: str) -> None:
    bench, recorder = bench_with_recordings(name, max_rows=8)
    asked = prompts([4, 40, 9, 33, 17])
    answers = bench.run(*[request(prompt, max_new_tokens=4 + 3 * i) for i, prompt in enumerate(asked)])
    for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        assert tuple(answer.tokens[0]) == alone(name, tuple(prompt), 4 + 3 * i)
    assert {8, 4, 2, 1} >= set(recorder.replayed) >= {8, 1}


def test_padding_changes_no_other_row() -> None:
    """Logits, and keys and values, are those of the same step without recordings and padding."""
    found = []
    for records in (False, True):
        bench = ContinuousBench(model("llama"), max_running=8)
        if records:
            assert model("llama").record_decoding(Recorder(), 8)
        logits = []
        plain = model("llama").run

        def run(chunks: Any, slots: Any, plain: Any = plain, logits: list[torch.Tensor] = logits) -> torch.Tensor:
            logits.append(plain(chunks, slots))
            logits[-1] = logits[-1].clone()
            return logits[-1].clone()

        bench.engine._model = type("Watched", (), {"run": staticmethod(run)})
        bench.run(*[request(prompt, max_new_tokens=5) for prompt in prompts([4, 40, 9])])
        memory: Any = model("llama")._memory
        found.append((logits, [states[: memory.spare_block].clone() for states in (*memory._keys, *memory._values)]))
    for plain_ones, recorded_ones in zip(*found, strict=True):
        for without, with_padding in zip(plain_ones, recorded_ones, strict=True):
            torch.testing.assert_close(with_padding, without, rtol=0, atol=1e-6)


def test_more_rows_than_were_recorded_run_as_before() -> None:
    bench, recorder = bench_with_recordings("llama", max_rows=2)
    asked = prompts([4, 7, 9])
    answers = bench.run(*[request(prompt, max_new_tokens=3 + 4 * i) for i, prompt in enumerate(asked)])
    assert [tuple(a.tokens[0]) for a in answers] == [alone("llama", tuple(p), 3 + 4 * i) for i, p in enumerate(asked)]
    assert set(recorder.replayed) == {2, 1}


def test_prompts_and_drafts_are_not_replayed() -> None:
    bench = ContinuousBench(model("llama"), max_running=8, max_draft_tokens=3)
    recorder = Recorder()
    assert model("llama").record_decoding(recorder, 8)
    recorder.replayed.clear()
    prompt = [5, 6, 7, 8] * 5
    (answer,) = bench.run(request(prompt, max_new_tokens=12))
    assert tuple(answer.tokens[0]) == alone("llama", tuple(prompt), 12)
    assert len(recorder.replayed) < bench.engine.num_steps


def test_progress_ends_at_the_whole() -> None:
    ContinuousBench(model("llama"))
    done: list[float] = []
    assert model("llama").record_decoding(Recorder(), 8, done.append)
    assert done == [0.25, 0.5, 0.75, 1.0]


def test_a_recording_that_answers_otherwise_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    ContinuousBench(model("llama"))

    def wrong(step: Step) -> Step:
        return lambda: step() * 1.2

    assert not model("llama").record_decoding(wrong, 4)
    assert "differs by" in caplog.text


def test_kernels_that_cannot_be_recorded_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "IS_RECORDABLE", False)
    ContinuousBench(model("llama"))
    assert not model("llama").record_decoding(Recorder(), 4)
