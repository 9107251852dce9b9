"""A preparation that nobody waits for any more, or that its caller gives up."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from slipstream_server.models.preparation import run_preparation, run_sentiment_recipe


class _GivenUpError(Exception):
    pass


def _programs(folder: Path) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if str(folder) in " ".join(child.cmdline())]


@pytest.mark.parametrize("program", ["prepare", "sentiment"])
def test_a_heartbeat_that_raises_ends_the_subprocess_and_the_call(tmp_path: Path, program: str) -> None:
    seen: list[int] = []

    def heartbeat() -> None:
        seen.append(len(_programs(tmp_path)))
        raise _GivenUpError

    began_s = time.monotonic()
    with pytest.raises(_GivenUpError):
        if program == "prepare":
            run_preparation(tmp_path / "source", tmp_path / "target", heartbeat=heartbeat)
        else:
            run_sentiment_recipe(tmp_path / "base", tmp_path / "data", tmp_path / "target", heartbeat=heartbeat)
    assert seen == [1]
    assert not _programs(tmp_path)
    assert time.monotonic() - began_s < 10
