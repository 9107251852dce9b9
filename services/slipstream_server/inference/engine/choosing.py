"""From a batch's logits to one token for each of its rows, every row by its own options.

Greedy rows take the best score, sampled rows draw. Log probabilities are of the model's own distribution, in float32,
before anything is done to it. A row whose scores leave nothing to choose (all banned, or the model answered NaN) is
told apart from the others. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.drawing import Sampler
from slipstream_server.inference.engine.processors import HouseRules, Processors
from slipstream_server.inference.generation import TopLogprobs


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen, row by row. ``is_broken``: the model's own logits are not finite; ``is_exhausted``: every
    token is banned.
    """

    token_ids: list[int]
    is_broken: list[bool]
    is_exhausted: list[bool]
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)


class Chooser:
    """The choice for the rows of one batch. Built when the batch changes; ``choose`` runs at every step."""

    def __init__(self, rows: Sequence[Row], rules: HouseRules, device: torch.device) -> None:
        self._processors = Processors(rows, rules)
        self._sampler = Sampler(rows, device)
        self._wanted = [
            (index, row.request.logprobs) for index, row in enumerate(rows) if row.request.logprobs is not None
        ]

    def choose(self, logits_RV: torch.Tensor) -> Choices:
        """One token per row, from float32 or float64 logits, which are overwritten."""
        scores_RV = logits_RV
        raw_WV = self._logprobs_wanted(scores_RV)
        best_R, tokens_R = scores_RV.max(dim=1)
        broken_R = ~best_R.isfinite()
        if self._processors.are_needed:
            self._processors.apply(scores_RV)
            best_R, tokens_R = scores_RV.max(dim=1)
        usable_R = best_R.isfinite()
        if not bool(usable_R.all()):
            scores_RV[~usable_R] = 0.0
        self._sampler.choose(scores_RV, tokens_R)
        exhausted_R = ~(usable_R | broken_R)
        return Choices(tokens_R.tolist(), broken_R.tolist(), exhausted_R.tolist(), self._logprobs_of(raw_WV, tokens_R))

    def _logprobs_wanted(self, scores_RV: torch.Tensor) -> torch.Tensor | None:
        if not self._wanted:
            return None
        index_W = torch.tensor([index for index, _ in self._wanted], device=scores_RV.device)
        return scores_RV.index_select(0, index_W).float().log_softmax(dim=1)

    def _logprobs_of(self, raw_WV: torch.Tensor | None, tokens_R: torch.Tensor) -> dict[int, TopLogprobs]:
        if raw_WV is None:
            return {}
        rows = [index for index, _ in self._wanted]
        tops = top_logprobs(raw_WV, tokens_R[rows], [number or 0 for _, number in self._wanted])
        return dict(zip(rows, tops, strict=True))


def top_logprobs(raw_WV: torch.Tensor, chosen_W: torch.Tensor, numbers: Sequence[int]) -> list[TopLogprobs]:
    """The chosen tokens' log probabilities and, for each row, its ``numbers`` best alternatives, best first."""
    of_chosen = raw_WV.gather(1, chosen_W.to(raw_WV.device)[:, None])[:, 0].tolist()
    most = min(max(numbers), raw_WV.shape[1])
    values_WN, ids_WN = raw_WV.topk(most, dim=1)
    return [
        TopLogprobs(logprob, ids[:number], values[:number])
        for logprob, ids, values, number in zip(of_chosen, ids_WN.tolist(), values_WN.tolist(), numbers, strict=True)
    ]
