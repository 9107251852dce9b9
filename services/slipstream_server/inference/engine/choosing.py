"""From a batch's logits to one token for each of its rows, every row by its own options.

Greedy rows take the best score, sampled rows draw. Log probabilities are of the model's own distribution, in float32,
before anything is done to it. Guided rows have their grammar's mask laid over their scores after every other step and
before sampling: no bias or rule brings a token back, and where only the end may follow it is allowed whatever bans it
(min_new_tokens gives way). A row whose scores leave nothing to choose (all banned, or the model answered NaN) is
told apart from the others. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from slipstream_server.errors import InternalError, InvalidField, SlipstreamError
from slipstream_server.inference.engine.constraints import Guide, Masks
from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.drawing import Sampler
from slipstream_server.inference.engine.processors import HouseRules, Processors
from slipstream_server.inference.engine.transfers import Arriving, to_device
from slipstream_server.inference.generation import TopLogprobs

NOT_NUMBERS = "the model's scores are not numbers"


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen, row by row. ``is_broken``: the model's own logits are not finite; ``is_exhausted``: every
    token is banned.
    """

    token_ids: list[int]
    is_broken: list[bool]
    is_exhausted: list[bool]
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)

    def error_of(self, index: int) -> SlipstreamError | None:
        """Why the row has no token, if it has none."""
        if self.is_broken[index]:
            return InternalError(NOT_NUMBERS)
        if index in self.problems:
            return InvalidField.of("constraint", self.problems[index])
        if self.is_exhausted[index]:
            return InvalidField.of("sampling", "its bans leave no token to choose from")
        return None


class Chooser:
    """The choice for the rows of one batch. Built when the batch changes; ``choose`` runs at every step."""

    def __init__(self, rows: Sequence[Row], rules: HouseRules, device: torch.device) -> None:
        self._processors = Processors(rows, rules)
        self._sampler = Sampler(rows, device)
        self._guided = [(i, row.guide) for i, row in enumerate(rows) if isinstance(row.guide, Guide)]
        self._masks = Masks([guide for _, guide in self._guided]) if self._guided else None
        self._guided_places = to_device(np.array([index for index, _ in self._guided], dtype=np.int64), device)
        self._wanted = [
            (index, row.request.logprobs) for index, row in enumerate(rows) if row.request.logprobs is not None
        ]
        self._wanted_places = to_device(np.array([index for index, _ in self._wanted], dtype=np.int64), device)

    def prepare(self) -> None:
        """Call before the forward pass: what does not need its logits is begun on another thread."""
        if self._masks is not None:
            self._masks.begin()

    def choose(self, logits_RV: torch.Tensor) -> Chosen:
        """One token per row, from float32 or float64 logits, which are overwritten."""
        scores_RV = logits_RV
        raw_WV = self._logprobs_wanted(scores_RV)
        best_R, tokens_R = scores_RV.max(dim=1)
        broken_R = ~best_R.isfinite()
        changes = self._processors.are_needed
        if changes:
            self._processors.apply(scores_RV)
        if self._masks is not None:
            self._apply_masks(scores_RV, self._masks)
        if changes or self._masks is not None:
            best_R, tokens_R = scores_RV.max(dim=1)
        usable_R = best_R.isfinite()
        if self._sampler.has_rows:
            # A GPU is not asked whether there is such a row: that would be to wait for it.
            if scores_RV.device.type != "cpu" or not bool(usable_R.all()):
                scores_RV.masked_fill_(~usable_R[:, None], 0.0)
            self._sampler.choose(scores_RV, tokens_R)
        return Chosen(
            tokens_R,
            # One transfer for all that the host must know.
            Arriving(torch.stack([tokens_R, broken_R, usable_R])),
            [index for index, _ in self._wanted],
            None if raw_WV is None else self._logprobs_of(raw_WV, tokens_R),
            self._guided,
        )

    def _apply_masks(self, scores_RV: torch.Tensor, masks: Masks) -> None:
        device = scores_RV.device
        banned_GV = to_device(masks.wait(scores_RV.shape[1]), device)
        places_G = self._guided_places
        scores_RV[places_G] = scores_RV.index_select(0, places_G).masked_fill(banned_GV, -torch.inf)
        for index, guide in self._guided:
            if guide.is_complete:
                ends = to_device(np.array([i for i in guide.ends if i < scores_RV.shape[1]], dtype=np.int64), device)
                scores_V = scores_RV[index]
                scores_V[ends] = torch.where(scores_V.max().isfinite(), scores_V[ends], 0.0)

    def _logprobs_wanted(self, scores_RV: torch.Tensor) -> torch.Tensor | None:
        if not self._wanted:
            return None
        return scores_RV.index_select(0, self._wanted_places).float().log_softmax(dim=1)

    def _logprobs_of(self, raw_WV: torch.Tensor, tokens_R: torch.Tensor) -> TopOf:
        tokens_W = tokens_R.index_select(0, self._wanted_places)
        return TopOf(raw_WV, tokens_W, [number or 0 for _, number in self._wanted])


class Chosen:
    """What was chosen for each row: on the device at once, on the host when it is read."""

    def __init__(
        self,
        tokens_R: torch.Tensor,
        facts_3R: Arriving,
        logged: Sequence[int],
        logprobs: TopOf | None,
        guided: Sequence[tuple[int, Guide]],
    ) -> None:
        self.tokens_R = tokens_R
        self._facts_3R = facts_3R
        self._logged = logged
        self._logprobs = logprobs
        self._guided = guided

    def read(self) -> Choices:
        """The same for the host, waited for."""
        token_ids, broken, usable = self._facts_3R.tolist()
        tops = [] if self._logprobs is None else self._logprobs.read()
        return Choices(
            token_ids,
            [bool(flag) for flag in broken],
            [not flag and not other for flag, other in zip(usable, broken, strict=True)],
            dict(zip(self._logged, tops, strict=True)),
            self._problems(usable),
        )

    def _problems(self, usable: Sequence[int]) -> dict[int, str]:
        """Guided rows that cannot go on, and why."""
        problems = {}
        for index, guide in self._guided:
            if guide.problem is not None:
                problems[index] = guide.problem
            elif not usable[index]:
                problems[index] = "together with the request's bans it leaves no token to choose from"
        return problems


class TopOf:
    """The log probabilities of chosen tokens and, for each row, its ``numbers`` best alternatives, best first."""

    def __init__(self, raw_WV: torch.Tensor, chosen_W: torch.Tensor, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._of_chosen = Arriving(raw_WV.gather(1, chosen_W.to(raw_WV.device)[:, None])[:, 0])
        values_WN, ids_WN = raw_WV.topk(min(max(numbers), raw_WV.shape[1]), dim=1)
        self._values, self._ids = Arriving(values_WN), Arriving(ids_WN)

    def read(self) -> list[TopLogprobs]:
        """The same for the host, waited for."""
        rows = zip(self._of_chosen.tolist(), self._ids.tolist(), self._values.tolist(), self._numbers, strict=True)
        return [TopLogprobs(logprob, ids[:number], values[:number]) for logprob, ids, values, number in rows]
