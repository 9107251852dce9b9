"""Which models of the catalogue to use for a task on this machine, best first, and why.

    asked for -> entries that qualify -> the best way to hold each that fits -> ranked

Larger models rank higher, as they tend to answer better; what has to be compressed, waits behind a gate or would crawl
on a CPU ranks lower. Published scores are told, not compared: few entries share a benchmark. Pure, but for asking what
is on this machine; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.load_choice import LoadChoice
from slipstream_server.inference.memory_advice import MemoryAdvice
from slipstream_server.models.catalogue import CatalogueEntry
from slipstream_server.models.devices import CPU

Estimate = Callable[[CatalogueEntry, LoadChoice], MemoryAdvice]
"""What an entry takes when it is held that way."""

# In the order in which they are preferred: how the weights are held, and what that costs in the ranking.
_WAYS = (
    (LoadChoice(quantization="none"), 0.0),
    (LoadChoice(quantization="int8"), 1.0),
    (LoadChoice(quantization="nf4", double_quantization=True), 2.0),
)
_MIN_COMPRESSED_PARAMETERS = 300_000_000
_QUICK_ON_A_CPU = 2_000_000_000
_MAX_SCORES_TOLD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What is asked for; empty and 0 mean any. ``memory_bytes`` is what a model may take."""

    task: str
    memory_bytes: int
    device: str = CPU
    licences: frozenset[str] = frozenset()
    languages: frozenset[str] = frozenset()
    min_context_tokens: int = 0
    local_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """An entry, how to hold it, what it then takes, and why it stands where it stands."""

    entry: CatalogueEntry
    choice: LoadChoice
    total_bytes: int
    is_local: bool
    rank: float
    reasons: tuple[str, ...] = field(default_factory=tuple)


def recommend(
    entries: Iterable[CatalogueEntry], need: Need, estimate: Estimate, is_local: Callable[[CatalogueEntry], bool]
) -> list[Recommendation]:
    """What fits, best first; empty where nothing does."""
    fitting = [
        found
        for entry in entries
        if _qualifies(entry, need)
        and (here := is_local(entry)) >= need.local_only
        and (found := _best_way(entry, need, estimate, is_local=here)) is not None
    ]
    fitting.sort(key=lambda found: (-found.rank, found.entry.name))
    return [_with_place(found, place, need) for place, found in enumerate(fitting)]


def _qualifies(entry: CatalogueEntry, need: Need) -> bool:
    licences = {licence.casefold() for licence in need.licences}
    return (
        need.task in entry.tasks
        and (not licences or entry.license.casefold() in licences)
        and need.languages <= {*entry.languages}
        and (not need.min_context_tokens or entry.context_tokens >= need.min_context_tokens)
    )


def _best_way(entry: CatalogueEntry, need: Need, estimate: Estimate, *, is_local: bool) -> Recommendation | None:
    for choice, cost in _WAYS:
        if cost and entry.num_parameters < _MIN_COMPRESSED_PARAMETERS:
            continue  # compressing what is small saves little and costs much
        try:
            advice = estimate(entry, choice)
        except SlipstreamError:
            continue
        if advice.total_bytes <= need.memory_bytes:
            return Recommendation(
                entry=entry,
                choice=choice,
                total_bytes=advice.total_bytes,
                is_local=is_local,
                rank=_rank(entry, need, cost, is_local=is_local),
                reasons=tuple(_reasons(entry, need, choice, is_local=is_local)),
            )
    return None


def _rank(entry: CatalogueEntry, need: Need, cost: float, *, is_local: bool) -> float:
    """In doublings of the size."""
    rank = math.log2(entry.num_parameters) - cost
    if need.device == CPU and entry.num_parameters > _QUICK_ON_A_CPU:
        rank -= 2 * math.log2(entry.num_parameters / _QUICK_ON_A_CPU)
    if len(entry.tasks) > 1 and entry.tasks[0] != need.task:
        rank -= 1.5  # it can do it, and was made for something else
    return rank + 0.5 * is_local - 0.5 * entry.gated


def _reasons(entry: CatalogueEntry, need: Need, choice: LoadChoice, *, is_local: bool) -> Iterator[str]:
    if is_local:
        yield "already on this machine"
    if need.task in entry.default_for:
        yield f"the usual choice for {need.task}"
    if choice.quantization != "none":
        yield f"fits only compressed to {choice.quantization}"
    if need.device == CPU and entry.num_parameters > _QUICK_ON_A_CPU:
        yield "will be slow on a CPU"
    for score in entry.scores[:_MAX_SCORES_TOLD]:
        yield f"published: {score.benchmark} {score.metric} {score.value:g} ({score.source})"
    if entry.context_tokens:
        yield f"context of {entry.context_tokens} tokens"
    yield f"licence {entry.license}"
    if need.languages:
        yield f"knows {', '.join(sorted(need.languages))}"
    if entry.gated:
        yield "its terms have to be accepted at the hub first (HF_TOKEN)"


def _with_place(found: Recommendation, place: int, need: Need) -> Recommendation:
    used = f"takes {found.total_bytes / 1024**3:.1f} of {need.memory_bytes / 1024**3:.1f} GiB"
    first = ("best of what fits", used) if place == 0 else (used,)
    return replace(found, reasons=(*first, *found.reasons))
