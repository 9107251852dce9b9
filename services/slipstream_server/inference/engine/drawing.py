"""Which tokens a sampled row may take, and which one it takes.

Filters in transformers' order and with its meaning (min_tokens_to_keep = 1): temperature, top_k (ties with the k-th
stay), top_p (a token stays while the more likely ones hold less than top_p), min_p, typical_p. Then the inverse of
the cumulative distribution, in token-id order and float64, at the row's own uniform number: neither the batch nor the
order of candidates has a say.

On a CPU most work happens on candidates: rows with top_k or top_p are narrowed to the few tokens that can survive
before anything is sorted. How many those are the host would have to ask, which a GPU is not waited for: it sorts all.
Shapes: S sampled rows of one kind, V vocabulary, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.draws import uniforms
from slipstream_server.inference.engine.transfers import to_device

_FIRST_GUESS = 256
# What float32 scores can be divided by. A temperature below it draws the likeliest token just as well.
_LEAST_TEMPERATURE = 1e-30
_GROWTH = 8


@dataclass(frozen=True, slots=True)
class _Group:
    """Sampled rows that are narrowed in the same way; parameters as float64 columns ``[S, 1]``, None where all are
    neutral.
    """

    kind: str
    rows: list[Row]
    index: torch.Tensor
    temperature: torch.Tensor | None
    top_k: torch.Tensor
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    typical_p: torch.Tensor | None


class Sampler:
    """The sampled rows of one batch. Built when the batch changes, used at every step."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        by_kind: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            if is_sampled(row):
                by_kind.setdefault(_kind(row), []).append(index)
        self._groups = [_group(kind, picked, rows, device) for kind, picked in by_kind.items()]

    @property
    def has_rows(self) -> bool:
        """Whether anything is drawn at all."""
        return bool(self._groups)

    def choose(self, scores_RV: torch.Tensor, tokens_R: torch.Tensor) -> None:
        """Overwrite the tokens of sampled rows with draws from their filtered distributions."""
        for group in self._groups:
            drawn_S = _draw(scores_RV.index_select(0, group.index), group)
            tokens_R.index_copy_(0, group.index, drawn_S)


def is_sampled(row: Row) -> bool:
    """Whether the row draws at random; temperature 0 means greedy."""
    sampling = row.request.sampling
    return sampling.do_sample and sampling.temperature > 0


def filtered(scores_SV: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """The scores that may still be drawn, -inf elsewhere, in float64: what ``Sampler`` draws from, spread over the
    vocabulary again.
    """
    result = torch.full(scores_SV.shape, -torch.inf, dtype=torch.float64, device=scores_SV.device)
    for group in Sampler(rows, scores_SV.device)._groups:
        values_SN, ids_SN = _candidates(scores_SV.index_select(0, group.index), group)
        result[group.index] = result[group.index].scatter(1, ids_SN, values_SN.double())
    return result


def _kind(row: Row) -> str:
    sampling = row.request.sampling
    if sampling.top_k > 0:
        return "top_k"
    return "top_p" if sampling.top_p < 1.0 else "whole"


def _group(kind: str, picked: list[int], rows: Sequence[Row], device: torch.device) -> _Group:
    mine = [rows[index] for index in picked]
    samplings = [row.request.sampling for row in mine]

    def column(values: list[float], neutral: float) -> torch.Tensor | None:
        if all(value == neutral for value in values):
            return None
        return to_device(np.array(values, dtype=np.float64), device)[:, None]

    return _Group(
        kind=kind,
        rows=mine,
        index=to_device(np.array(picked), device),
        temperature=column([max(s.temperature, _LEAST_TEMPERATURE) for s in samplings], 1.0),
        top_k=to_device(np.array([s.top_k for s in samplings]), device)[:, None],
        top_p=column([s.top_p for s in samplings], 1.0),
        min_p=column([s.min_p for s in samplings], 0.0),
        typical_p=column([s.typical_p for s in samplings], 1.0),
    )


def _draw(scores_SV: torch.Tensor, group: _Group) -> torch.Tensor:
    values_SN, ids_SN = _candidates(scores_SV, group)
    if group.kind != "whole":
        values_SN, ids_SN = _by_id(values_SN, ids_SN, scores_SV.shape[1])
    mass_SN = (values_SN - values_SN.amax(dim=1, keepdim=True)).exp().cumsum(dim=1, dtype=torch.float64)
    draws = uniforms(
        [row.request.sampling.seed for row in group.rows],
        [row.index for row in group.rows],
        [row.num_generated for row in group.rows],
    )
    total_S1 = mass_SN[:, -1:].contiguous()
    target_S1 = to_device(draws, mass_SN.device)[:, None] * total_S1
    # The product may round up to the total: the last token with any mass is then the answer.
    last_S1 = torch.searchsorted(mass_SN, total_S1)
    chosen_S1 = torch.minimum(torch.searchsorted(mass_SN, target_S1, right=True), last_S1)
    return ids_SN.gather(1, chosen_S1.clamp(max=ids_SN.shape[1] - 1))[:, 0]


def _by_id(values_SN: torch.Tensor, ids_SN: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates in token-id order."""
    if ids_SN.shape[1] == vocab_size:
        return torch.empty_like(values_SN).scatter_(1, ids_SN, values_SN), _all_ids(values_SN)
    ids_SN, order_SN = ids_SN.sort(dim=1)
    return values_SN.gather(1, order_SN), ids_SN


def _all_ids(scores_SV: torch.Tensor) -> torch.Tensor:
    return torch.arange(scores_SV.shape[1], device=scores_SV.device).expand(scores_SV.shape)


def _candidates(scores_SV: torch.Tensor, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Filtered scores and their token ids: by falling score and in float64, for ``whole`` by token id."""
    if group.temperature is not None:
        scores_SV = scores_SV / group.temperature.to(scores_SV.dtype)
    if group.kind == "top_k":
        values_SN, ids_SN = _most_likely(scores_SV, group)
        log_total_S1 = values_SN.logsumexp(dim=1, keepdim=True)
    elif group.kind == "top_p":
        values_SN, ids_SN, log_total_S1 = _nucleus(scores_SV, group)
    else:
        values_SN, ids_SN, log_total_S1 = scores_SV, _all_ids(scores_SV), None
    if group.top_p is not None and log_total_S1 is not None:
        values_SN = _keep_top_p(values_SN, group.top_p, log_total_S1)
    if group.min_p is not None:
        values_SN = _keep_min_p(values_SN, group.min_p)
    if group.typical_p is not None:
        values_SN = _keep_typical(values_SN, group.typical_p)
    return values_SN, ids_SN


def _most_likely(scores_SV: torch.Tensor, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's k best and whatever ties with the last of them, by falling score; the rest of the rectangle is
    -inf.
    """
    vocab_size = scores_SV.shape[1]
    most = min(vocab_size, max(row.request.sampling.top_k for row in group.rows))
    best_SK = scores_SV.topk(most, dim=1).values
    top_k_S1 = group.top_k.clamp(max=vocab_size)
    least_S1 = best_SK.gather(1, top_k_S1 - 1)
    num_kept = vocab_size
    if _may_ask(scores_SV):
        # Of banned tokens, those of -inf, there may be more than may be kept.
        num_kept = max(1, int(((scores_SV >= least_S1) & (scores_SV > -torch.inf)).sum(dim=1).max()))
    values_SN, ids_SN = _best(scores_SV, num_kept)
    return values_SN.masked_fill(values_SN < least_S1, -torch.inf).double(), ids_SN


def _nucleus(scores_SV: torch.Tensor, group: _Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Enough of the best tokens to hold top_p of every row, by falling score, and the log of each row's whole mass."""
    assert group.top_p is not None
    vocab_size = scores_SV.shape[1]
    log_total_S1 = scores_SV.logsumexp(dim=1, keepdim=True).double()
    size = min(_FIRST_GUESS, vocab_size) if _may_ask(scores_SV) else vocab_size
    while True:
        values_SN, ids_SN = _best(scores_SV, size)
        held_S = (values_SN.double() - log_total_S1).exp().sum(dim=1)
        if size == vocab_size or bool((held_S >= group.top_p[:, 0]).all()):
            return values_SN.double(), ids_SN, log_total_S1
        size = min(size * _GROWTH, vocab_size)


def _may_ask(scores_SV: torch.Tensor) -> bool:
    """Whether the host may look at what comes out without waiting for a device."""
    return scores_SV.device.type == "cpu"


def _best(scores_SV: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many of the best scores and their token ids, by falling score."""
    if number == scores_SV.shape[1]:
        values_SV, ids_SV = scores_SV.sort(dim=1, descending=True)
        return values_SV, ids_SV
    values_SN, ids_SN = scores_SV.topk(number, dim=1)
    return values_SN, ids_SN


def _keep_top_p(values_SN: torch.Tensor, top_p_S1: torch.Tensor, log_total_S1: torch.Tensor) -> torch.Tensor:
    mass_SN = (values_SN - log_total_S1).exp()
    before_SN = mass_SN.cumsum(dim=1) - mass_SN
    removed_SN = (before_SN >= top_p_S1) & (top_p_S1 < 1.0)
    removed_SN[:, 0] = False
    return values_SN.masked_fill(removed_SN, -torch.inf)


def _keep_min_p(values_SN: torch.Tensor, min_p_S1: torch.Tensor) -> torch.Tensor:
    share_SN = (values_SN - values_SN.amax(dim=1, keepdim=True)).exp()
    return values_SN.masked_fill(share_SN < min_p_S1, -torch.inf)


def _keep_typical(values_SN: torch.Tensor, typical_p_S1: torch.Tensor) -> torch.Tensor:
    """Locally typical tokens ("Locally Typical Sampling", 2022), cut as transformers does: ties with the last one
    kept stay.
    """
    log_mass_SN = values_SN.log_softmax(dim=1)
    mass_SN = log_mass_SN.exp()
    entropy_S1 = -(log_mass_SN * mass_SN).nansum(dim=1, keepdim=True)
    surprise_SN = (-log_mass_SN - entropy_S1).abs()
    sorted_SN, order_SN = surprise_SN.sort(dim=1)
    held_SN = mass_SN.gather(1, order_SN).cumsum(dim=1)
    last_S1 = (held_SN < typical_p_S1).sum(dim=1, keepdim=True).clamp(max=values_SN.shape[1] - 1)
    removed_SN = (surprise_SN > sorted_SN.gather(1, last_S1)) & (typical_p_S1 < 1.0)
    removed_SN = removed_SN.scatter(1, order_SN[:, :1], False)
    return values_SN.masked_fill(removed_SN, -torch.inf)
