"""What a check of ``slipstream doctor`` found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: what was looked at, how it is, and how to mend it."""

    name: str
    level: Level
    text: str
    mend: str = ""


def ok(name: str, text: str) -> Finding:
    return Finding(name=name, level=Level.OK, text=text)


def warn(name: str, text: str, mend: str) -> Finding:
    return Finding(name=name, level=Level.WARN, text=text, mend=mend)


def fail(name: str, text: str, mend: str) -> Finding:
    return Finding(name=name, level=Level.FAIL, text=text, mend=mend)
