"""What a row's options do to its scores before a token is chosen, and the model's own rules.

Same steps, same order and same arithmetic as transformers' logits processors (GenerationMixin._get_logits_processor,
5.17 to 5.23): bias, repetition penalty, n-gram ban, suppressed tokens, minimum length, forced tokens. Presence and
frequency penalties are OpenAI's: over generated tokens only. A row that does not use a step does not pay for it:
every step edits the (row, token) pairs it names, in one scatter.

Shapes: R rows, V vocabulary, K pairs. Runs on the engine's thread; mutates the scores it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slipstream_server.inference.engine.core import Row, TokenArray
from slipstream_server.inference.engine.transfers import to_device
from slipstream_server.inference.generation import GenerationRequest, Sampling

Picked = list[tuple[int, Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HouseRules:
    """What a model's generation_config demands of every answer (encoder-decoder models, mostly)."""

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    forced_first: int | None = None
    forced_last: tuple[int, ...] = ()

    @classmethod
    def of(cls, generation_config: Any, is_encoder_decoder: bool) -> HouseRules:
        """The rules among the fields of a transformers GenerationConfig; forced_bos_token_id means the second decoder
        token.
        """
        bad_words = getattr(generation_config, "bad_words_ids", None) or ()
        single = tuple(ids[0] for ids in bad_words if len(ids) == 1)
        return cls(
            suppressed=(*_ids(generation_config, "suppress_tokens"), *single),
            suppressed_first=_ids(generation_config, "begin_suppress_tokens"),
            forced_first=getattr(generation_config, "forced_bos_token_id", None) if is_encoder_decoder else None,
            forced_last=_ids(generation_config, "forced_eos_token_id"),
        )

    def num_forced_first(self, request: GenerationRequest) -> int:
        """How many tokens at an answer's beginning are forced, whatever it is to say."""
        wanted = request.forced_first_token_id
        return int((self.forced_first if wanted is None else wanted) is not None)

    @property
    def is_empty(self) -> bool:
        return self == HouseRules()


class Pairs:
    """(row, token) pairs in the making, with a value each; tokens outside the vocabulary are left out."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[TokenArray] = []
        self._tokens: list[TokenArray] = []
        self._values: list[np.ndarray[Any, np.dtype[np.float64]]] = []

    def add(self, row: int, tokens: Any, values: Any = 0.0) -> None:
        ids = np.asarray(tokens, dtype=np.int64)
        inside = (ids >= 0) & (ids < self._vocab_size)
        self._tokens.append(ids[inside])
        self._rows.append(np.full(int(inside.sum()), row, dtype=np.int64))
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float64), ids.shape)[inside])

    def on(self, scores_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Rows, tokens and values as tensors beside the scores; None where there are no pairs."""
        if not any(len(tokens) for tokens in self._tokens):
            return None
        device = scores_RV.device
        return (
            to_device(np.concatenate(self._rows), device),
            to_device(np.concatenate(self._tokens), device),
            to_device(np.concatenate(self._values), device).to(scores_RV.dtype),
        )


class Processors:
    """The steps that the rows of one batch need. Built when the batch changes, applied at every step."""

    def __init__(self, rows: Sequence[Row], rules: HouseRules) -> None:
        self._rows = rows
        self._rules = rules
        self._biased = _pick(rows, lambda s: bool(s.logit_bias))
        self._repetitive = _pick(rows, lambda s: s.repetition_penalty != 1.0)
        self._penalized = _pick(rows, lambda s: s.presence_penalty != 0.0 or s.frequency_penalty != 0.0)
        self._ngrams = _pick(rows, lambda s: s.no_repeat_ngram_size > 0)
        self._unending = [(i, row) for i, row in enumerate(rows) if _may_not_end(row)]
        forces = any(row.request.forced_first_token_id is not None for row in rows)
        self._has_rules = forces or not rules.is_empty
        self._biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def are_needed(self) -> bool:
        """Whether any step would change anything now."""
        steps = (self._biased, self._repetitive, self._penalized, self._ngrams)
        return self._has_rules or any(steps) or any(_may_not_end(row) for _, row in self._unending)

    def apply(self, scores_RV: torch.Tensor) -> None:
        """Change the scores in place."""
        if self._biased:
            self._add_biases(scores_RV)
        if self._repetitive:
            self._penalize_repetition(scores_RV)
        if self._penalized:
            self._penalize_presence(scores_RV)
        if self._ngrams:
            self._ban_ngrams(scores_RV)
        if self._unending:
            self._ban_endings(scores_RV)
        if self._has_rules:
            self._apply_rules(scores_RV)

    def _add_biases(self, scores_RV: torch.Tensor) -> None:
        if self._biases is None:
            pairs = Pairs(scores_RV.shape[1])
            for index, row in self._biased:
                bias = row.request.sampling.logit_bias
                pairs.add(index, list(bias), list(bias.values()))
            self._biases = pairs.on(scores_RV)
        if self._biases is not None:
            rows_K, tokens_K, values_K = self._biases
            scores_RV[rows_K, tokens_K] += values_K

    def _penalize_repetition(self, scores_RV: torch.Tensor) -> None:
        pairs = Pairs(scores_RV.shape[1])
        for index, row in self._repetitive:
            pairs.add(index, row.counts[0], row.request.sampling.repetition_penalty)
        if (found := pairs.on(scores_RV)) is not None:
            rows_K, tokens_K, penalties_K = found
            old_K = scores_RV[rows_K, tokens_K]
            scores_RV[rows_K, tokens_K] = torch.where(old_K < 0, old_K * penalties_K, old_K / penalties_K)

    def _penalize_presence(self, scores_RV: torch.Tensor) -> None:
        pairs = Pairs(scores_RV.shape[1])
        for index, row in self._penalized:
            tokens, counts = row.counts_generated
            sampling = row.request.sampling
            pairs.add(index, tokens, sampling.presence_penalty + sampling.frequency_penalty * counts)
        if (found := pairs.on(scores_RV)) is not None:
            rows_K, tokens_K, values_K = found
            scores_RV[rows_K, tokens_K] -= values_K

    def _ban_ngrams(self, scores_RV: torch.Tensor) -> None:
        pairs = Pairs(scores_RV.shape[1])
        for index, row in self._ngrams:
            pairs.add(index, tokens_completing_ngrams(row.tokens, row.request.sampling.no_repeat_ngram_size))
        _ban(scores_RV, pairs)

    def _ban_endings(self, scores_RV: torch.Tensor) -> None:
        pairs = Pairs(scores_RV.shape[1])
        for index, row in self._unending:
            stopping = row.request.stopping
            if _may_not_end(row):
                pairs.add(index, (*stopping.eos_token_ids, *stopping.stop_token_ids))
        _ban(scores_RV, pairs)

    def _apply_rules(self, scores_RV: torch.Tensor) -> None:
        rules = self._rules
        pairs = Pairs(scores_RV.shape[1])
        for index, row in enumerate(self._rows):
            if (forced := self._forced(row)) is not None:
                scores_RV[index] = -torch.inf
                scores_RV[index].index_fill_(0, to_device(np.array(forced), scores_RV.device), 0.0)
            pairs.add(index, rules.suppressed)
            if row.num_generated == (0 if self._first_forced(row) is None else 1):
                pairs.add(index, rules.suppressed_first)
        _ban(scores_RV, pairs)

    def _forced(self, row: Row) -> tuple[int, ...] | None:
        """The only tokens allowed here, if the model's rules force some. Without eos (ignore_eos), no end is forced."""
        rules, stopping = self._rules, row.request.stopping
        if row.num_generated == 0 and (first := self._first_forced(row)) is not None:
            return (first,)
        # A grammar decides itself where its row may end.
        may_force = bool(rules.forced_last and stopping.eos_token_ids) and row.guide is None
        if may_force and row.num_generated == stopping.max_new_tokens - 1:
            return rules.forced_last
        return None

    def _first_forced(self, row: Row) -> int | None:
        wanted = row.request.forced_first_token_id
        return self._rules.forced_first if wanted is None else wanted


def tokens_completing_ngrams(tokens: TokenArray, size: int) -> TokenArray:
    """Tokens that would complete an n-gram of ``size`` that stands in ``tokens`` already."""
    if len(tokens) < size:
        return np.empty(0, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    prefix = tokens[len(tokens) + 1 - size :]
    return np.asarray(windows[(windows[:, :-1] == prefix).all(axis=1), -1], dtype=np.int64)


def _ban(scores_RV: torch.Tensor, pairs: Pairs) -> None:
    if (found := pairs.on(scores_RV)) is not None:
        scores_RV[found[0], found[1]] = -torch.inf


def _may_not_end(row: Row) -> bool:
    return row.num_generated < row.request.stopping.min_new_tokens


def _pick(rows: Sequence[Row], wants: Callable[[Sampling], bool]) -> Picked:
    return [(index, row) for index, row in enumerate(rows) if wants(row.request.sampling)]


def _ids(generation_config: Any, name: str) -> tuple[int, ...]:
    value: int | Iterable[int] | None = getattr(generation_config, name, None)
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(item) for item in value)
