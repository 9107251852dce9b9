"""A training service whose jobs the fake runner runs, with a dataset of talk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.rpc.training_kit import Bench, TrainingClient, new_bench, training_service


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TRAINING_BENCH", str(tmp_path))
    return new_bench(tmp_path)


@pytest.fixture
async def service(bench: Bench) -> AsyncIterator[TrainingClient]:
    async with training_service(bench) as client:
        await client.upload("talk")
        yield client
    for process in bench.runners():
        process.kill()
