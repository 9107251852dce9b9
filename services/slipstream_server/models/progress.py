"""How a pull reports where it is. Called on the thread that pulls; a callback must not block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class PullStage(StrEnum):
    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    EXTRACTING = "extracting"
    CONVERTING = "converting"
    READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """``done_bytes`` of ``total_bytes`` of this stage; None where the total is not known."""

    stage: PullStage
    source: str = ""
    done_bytes: int = 0
    total_bytes: int | None = None


ProgressCallback: TypeAlias = Callable[[PullProgress], None]


def ignore_progress(progress: PullProgress) -> None:
    """For callers that do not want to know."""
