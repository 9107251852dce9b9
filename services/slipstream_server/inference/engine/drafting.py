"""Guesses of what comes next, from what stands in the text already ("Prompt Lookup Decoding", 2023).

The longest n-gram that ends a sequence is looked up in the sequence itself; what followed it there is the guess. The
model verifies a whole guess in one forward, and for greedy rows the answer stays exactly what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from slipstream_server.inference.engine.continuous_scheduler import Chunk
from slipstream_server.inference.engine.core import Row, TokenArray
from slipstream_server.inference.engine.transfers import Arriving, to_device

_NGRAM_SIZES = (4, 3, 2)
_MOST_TOKENS_SEARCHED = 4096


def draft(row: Row, most: int) -> tuple[int, ...]:
    """Up to ``most`` guessed tokens; none for rows whose next token depends on more than the best score."""
    room = row.request.stopping.max_new_tokens - row.num_generated - 1
    if room < 1 or not _is_plainly_greedy(row):
        return ()
    return tuple(int(token) for token in _continuation(row.tokens[-_MOST_TOKENS_SEARCHED:], min(most, room)))


def verified(
    chunks: Sequence[Chunk], logits_MV: torch.Tensor, last_places: Mapping[Chunk, int]
) -> dict[Chunk, list[int]]:
    """Of each chunk's drafts those that the model would have chosen itself, and the token it chooses after them;
    nothing where its scores are no numbers. A chunk's logits end at its place among ``[M, V]``.
    """
    if not chunks:
        return {}
    spans = [np.arange(last_places[chunk] - len(chunk.drafts), last_places[chunk] + 1) for chunk in chunks]
    scores_D, best_D = logits_MV.index_select(0, to_device(np.concatenate(spans), logits_MV.device)).max(dim=1)
    best, is_number = Arriving(torch.stack([best_D, scores_D.isfinite()])).tolist()
    accepted = {}
    for chunk in chunks:
        size = len(chunk.drafts) + 1
        accepted[chunk] = _agreed(chunk.drafts, best[:size]) if all(is_number[:size]) else []
        best, is_number = best[size:], is_number[size:]
    return accepted


def _agreed(drafts: Sequence[int], best: list[int]) -> list[int]:
    wrong = (place for place, drafted in enumerate(drafts) if drafted != best[place])
    return best[: next(wrong, len(drafts)) + 1]


def _continuation(tokens: TokenArray, most: int) -> TokenArray:
    for size in _NGRAM_SIZES:
        if len(tokens) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        matches = (windows == tokens[-size:]).all(axis=1).nonzero()[0]
        if len(matches):
            start = int(matches[-1]) + size
            return tokens[start : start + most]
    return tokens[:0]


def _is_plainly_greedy(row: Row) -> bool:
    request = row.request
    sampling = request.sampling
    return (
        not (sampling.do_sample and sampling.temperature > 0)
        and not sampling.logit_bias
        and sampling.repetition_penalty == 1.0
        and sampling.presence_penalty == sampling.frequency_penalty == 0.0
        and not sampling.no_repeat_ngram_size
        and request.stopping.min_new_tokens <= row.num_generated
        and request.logprobs is None
        and request.forced_first_token_id is None
        and row.guide is None
    )
