"""From answers to figures: rates and percentiles of one run, and whether two sides said the same. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.engine.requests import Answer, Request

LATENCIES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "e2e_p50_ms", "e2e_p99_ms")


class WrongAnswers(Exception):
    """A side did not generate what it was asked for: its figures mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run of one side came to. ``latencies_ms`` is empty where tokens do not come one by one."""

    output_tokens_per_s: float
    requests_per_s: float
    makespan_s: float
    latencies_ms: Mapping[str, float]
    cached_prompt_tokens: int | None

    def rate(self, measure: str) -> float:
        """The measure as a rate, so that larger is better: latencies become 1/s."""
        if measure == "output_tokens_per_s":
            return self.output_tokens_per_s
        return 1000 / max(self.latencies_ms[measure], 1e-3)


def figures(requests: Sequence[Request], answers: Sequence[Answer], *, streams: bool) -> Figures:
    """The figures of a run; raises WrongAnswers where the number of tokens is not the one asked for."""
    check_counts(requests, answers)
    makespan_s = max(answer.token_times_s[-1] for answer in answers) - min(request.arrival_s for request in requests)
    cached = [answer.cached_prompt_tokens for answer in answers]
    return Figures(
        output_tokens_per_s=sum(len(answer.token_ids) for answer in answers) / makespan_s,
        requests_per_s=len(requests) / makespan_s,
        makespan_s=makespan_s,
        latencies_ms=_latencies(requests, answers) if streams else {},
        cached_prompt_tokens=None if None in cached else sum(number or 0 for number in cached),
    )


def check_counts(requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    """Everyone generates exactly as much: else a side that stops early would look fast."""
    asked = [request.max_new_tokens for request in requests]
    got = [len(answer.token_ids) for answer in answers]
    if asked != got:
        wrong = next((i for i, (a, g) in enumerate(zip(asked, got, strict=False)) if a != g), min(len(asked), len(got)))
        raise WrongAnswers(
            f"request {wrong}: {got[wrong : wrong + 1]} tokens came, {asked[wrong : wrong + 1]} were asked for"
        )


def _latencies(requests: Sequence[Request], answers: Sequence[Answer]) -> dict[str, float]:
    found = _spread("", requests, answers)
    for group in sorted({request.group for request in requests} - {"all"}):
        members = [i for i, request in enumerate(requests) if request.group == group]
        found |= _spread(f"{group}_", [requests[i] for i in members], [answers[i] for i in members])
    return found


def _spread(prefix: str, requests: Sequence[Request], answers: Sequence[Answer]) -> dict[str, float]:
    pairs = list(zip(requests, answers, strict=True))
    samples = {
        "ttft": [answer.token_times_s[0] - request.arrival_s for request, answer in pairs],
        "itl": [gap for answer in answers for gap in gaps(answer.token_times_s)],
        "e2e": [answer.token_times_s[-1] - request.arrival_s for request, answer in pairs],
    }
    return {
        f"{prefix}{name}_p{rank}_ms": round(1000 * percentile(values, rank), 3)
        for name, values in samples.items()
        if values
        for rank in (50, 99)
    }


def gaps(times_s: Sequence[float]) -> list[float]:
    """Time from each token to the next."""
    return [later - earlier for earlier, later in itertools.pairwise(times_s)]


def percentile(values: Iterable[float], rank: float) -> float:
    """By linear interpolation between the two nearest ranks, as NumPy does it."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * rank / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How alike the answers of two sides are: whole answers, and tokens before the first that differs."""

    same_answers: float
    same_tokens: float


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> Agreement:
    """Greedy answers in float32 part only at near-ties, so most of them are the same to the end."""
    pairs = [(a.token_ids, b.token_ids) for a, b in zip(ours, theirs, strict=True)]
    same = sum(a == b for a, b in pairs)
    tokens = sum(_common_length(a, b) for a, b in pairs)
    return Agreement(
        same_answers=round(same / len(pairs), 3),
        same_tokens=round(tokens / sum(len(a) for a, _ in pairs), 3),
    )


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
