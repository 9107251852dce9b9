"""What travels between the bench and a side: requests, and when which token of an answer came.

Standard library alone: it is imported in every peer's environment. Times are seconds since the run began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt in tokens, how many tokens to generate (always all of them, greedily), and when it arrives.

    ``group`` tells kinds of requests of one workload apart in the report.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival_s: float = 0.0
    group: str = "all"


@dataclass(slots=True, kw_only=True)
class Answer:
    """The tokens of one request and the time of each. ``cached_prompt_tokens`` is None where a side does not say."""

    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    cached_prompt_tokens: int | None = None

    def add(self, token_ids: Sequence[int], time_s: float) -> None:
        """Tokens that came together."""
        self.token_ids += token_ids
        self.token_times_s += [time_s] * len(token_ids)


def pack(item: Request | Answer) -> dict[str, Any]:
    """As JSON knows it."""
    return asdict(item)


def request_from(values: Mapping[str, Any]) -> Request:
    return Request(**{**values, "prompt": tuple(values["prompt"])})


def answer_from(values: Mapping[str, Any]) -> Answer:
    return Answer(**values)
