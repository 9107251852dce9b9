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
    TRAINING = "training"
    READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """``done_bytes`` of ``total_bytes`` of this stage; None where the total is not known.

    ``done_share`` (0 to 1) tells how far a stage is that is no matter of bytes.
    """

    stage: PullStage
    source: str = ""
    done_bytes: int = 0
    total_bytes: int | None = None
    done_share: float | None = None

    @property
    def fraction(self) -> float | None:
        """How far this stage is, 0 to 1; None where that is not known."""
        return self.done_bytes / self.total_bytes if self.total_bytes else self.done_share


ProgressCallback: TypeAlias = Callable[[PullProgress], None]


def ignore_progress(progress: PullProgress) -> None:
    """For callers that do not want to know."""
