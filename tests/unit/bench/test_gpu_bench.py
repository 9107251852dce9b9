"""The GPU bench's judgement of failures, without a GPU: a peer's is told in its line, our own ends the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tests.bench import gpu_engine
from tests.bench.gpu_engine import throughput_lines
from tests.bench.gpu_sides import Job

FACTS = {"model": "tiny", "seed": 20, "device": "cpu", "dtype": "float32"}
MODEL = SimpleNamespace(config=SimpleNamespace(vocab_size=100))
ARGUMENTS = argparse.Namespace(tiny=True, runs=2, without=["transformers_cb"])


class Side:
    """Answers everything, on either side."""

    is_recorded = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def run(self, jobs: Sequence[Job]) -> int:
        return len(jobs)


class Failing(Side):
    """Has no memory left once it runs."""

    def run(self, jobs: Sequence[Job]) -> int:
        raise MemoryError("the cache takes it all")


class Unloadable(Side):
    """Has no memory to begin with."""

    def __init__(self, *_: object, **__: object) -> None:
        raise MemoryError("the cache takes it all")


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engine, "_copy_of", lambda model: model)
    monkeypatch.setattr(gpu_engine, "Ours", Side)
    monkeypatch.setattr(gpu_engine, "StaticGenerate", Side)


def test_two_sides_that_run_make_a_line_with_a_ratio() -> None:
    (line,) = throughput_lines(MODEL, ARGUMENTS, FACTS)
    assert line["versus"] == "generate"
    assert line["ratio_median"] > 0
    assert "left_out" not in line


@pytest.mark.parametrize("peer", [Failing, Unloadable])
def test_the_line_of_a_peer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, peer: type[Side]) -> None:
    monkeypatch.setattr(gpu_engine, "StaticGenerate", peer)
    (line,) = throughput_lines(MODEL, ARGUMENTS, FACTS)
    assert line["left_out"] == "MemoryError: the cache takes it all"
    assert "ratio_median" not in line
    assert {"bench", "workload", "versus", "model", "device", "commit"} <= line.keys()


@pytest.mark.parametrize("ours", [Failing, Unloadable])
def test_our_own_failure_is_no_peers(monkeypatch: pytest.MonkeyPatch, ours: type[Side]) -> None:
    monkeypatch.setattr(gpu_engine, "Ours", ours)
    with pytest.raises(MemoryError):
        list(throughput_lines(MODEL, ARGUMENTS, FACTS))


def test_our_own_failure_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_steps(*_: Any) -> list[dict[str, Any]]:
        return []

    monkeypatch.setattr(gpu_engine, "Ours", Failing)
    monkeypatch.setattr(gpu_engine, "step_lines", no_steps)
    monkeypatch.setattr(gpu_engine, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(sys, "argv", ["gpu_engine", "--device", "cpu", "--tiny", "--without", "transformers_cb"])
    assert gpu_engine.main() == 1
    assert "our own side has failed" in capsys.readouterr().err
