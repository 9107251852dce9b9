"""What the bench asks of a side, and what it gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

EMBED, CLASSIFY = "embed", "classify"
WORKS = (EMBED, CLASSIFY)

Values = Sequence[Sequence[float]]
"""For each text its unit vector, or the scores of the labels in the order of their ids."""


class SideFailed(Exception):
    """A side did not start, or died, or could not answer. The message names it."""


@dataclass(frozen=True, slots=True)
class Done:
    """What one run took and gave."""

    seconds: float
    values: Values


class Side(Protocol):
    """A loaded side that waits without computing."""

    async def run(self, work: str, texts: Sequence[str]) -> Done:
        """Work on all texts; raises SideFailed."""

    def facts(self) -> dict[str, Any]:
        """Versions and settings, for the report."""
