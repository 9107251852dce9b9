"""Beam search, by the model's own ``generate``: searches whose settings are equal share a call.

A cancelled or expired request is seen between tokens: its beams are declared finished and its answer is thrown away.
Engine thread, under inference_mode.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, StoppingCriteria, StoppingCriteriaList

from slipstream_server.errors import InternalError, InvalidField
from slipstream_server.inference.engine.choosing import NOT_NUMBERS
from slipstream_server.inference.engine.core import Generation
from slipstream_server.inference.engine.passes import Traits, padded
from slipstream_server.inference.generation import GenerationRequest


def beam_key(request: GenerationRequest) -> Hashable:
    """Equal for requests that one call of ``generate`` serves: it takes these once for all rows.

    Steps that look back at the prompt would see the padding of shorter ones: with them, only prompts of one length
    share. Searches that may fail, see ``_check_whole``, are each alone.
    """
    sampling, stopping, beams = request.sampling, request.stopping, request.beams
    looks_back = sampling.repetition_penalty != 1.0 or sampling.no_repeat_ngram_size > 0
    return (
        (beams.num_beams, beams.length_penalty, beams.early_stopping, request.num_return_sequences),
        (stopping.max_new_tokens, stopping.min_new_tokens, stopping.eos_token_ids, stopping.stop_token_ids),
        (sampling.repetition_penalty, sampling.no_repeat_ngram_size, tuple(sorted(sampling.logit_bias.items()))),
        len(request.prompt_token_ids) if looks_back else None,
        request.forced_first_token_id,
        request.id if beams.length_penalty < 0 else None,
    )


def search_in_pieces(
    traits: Traits, generation: Generation, poll: Callable[[], None], *, piece_tokens: int
) -> list[list[int]]:
    """One generation's answers by a decoder-only model. Its prompt is read once for all beams, in pieces after each of
    which ``poll`` is called; where the generation is over by then, the answers are empty.
    """
    tokens = generation.request.prompt_token_ids
    cache = DynamicCache(config=traits.model.config.get_text_config(decoder=True))
    # The last token is read by the search itself.
    for start in range(0, len(tokens) - 1, piece_tokens):
        piece = tokens[start : min(start + piece_tokens, len(tokens) - 1)]
        traits.model.get_decoder()(
            input_ids=torch.tensor([piece], device=traits.device), past_key_values=cache, use_cache=True
        )
        poll()
        if generation.is_over:
            return [[] for _ in generation.rows]
    if cache.is_initialized:
        cache.batch_repeat_interleave(generation.request.beams.num_beams)
    return search(traits, [generation], poll, cache=cache)[0]


def search(
    traits: Traits, generations: Sequence[Generation], poll: Callable[[], None], *, cache: Cache | None = None
) -> list[list[list[int]]]:
    """Each generation's answers, best first, as many as it has rows. All must have the same ``beam_key``. ``cache``
    holds what was read already, for every beam.

    Raises InvalidField where the settings leave a search without an answer, and InternalError where the model's
    scores do.
    """
    requests = [generation.request for generation in generations]
    prompts = [np.array(request.prompt_token_ids, dtype=np.int64) for request in requests]
    tokens_PT, mask_PT = padded(prompts, traits.pad_token_id, left=not traits.is_encoder_decoder)
    found = traits.model.generate(
        input_ids=tokens_PT.to(traits.device),
        attention_mask=mask_PT.to(traits.device),
        stopping_criteria=StoppingCriteriaList([_Unwanted(generations, poll)]),
        past_key_values=cache,
        **_settings(traits, requests[0]),
    )
    num_context = 1 if traits.is_encoder_decoder else tokens_PT.shape[1]
    answers = iter(found[:, num_context:].tolist())
    ended = [[_until_end(next(answers), request) for _ in range(request.num_return_sequences)] for request in requests]
    for generation, texts in zip(generations, ended, strict=True):
        if not generation.is_over:
            _check_whole(texts, generation.request, traits.pad_token_id)
    return ended


def _check_whole(answers: Sequence[list[int]], request: GenerationRequest, pad_token_id: int) -> None:
    """Transformers 5.23 gives a beam that has not ended the score -1e9. A length penalty far below 0 gives worse ones
    to those that have, and what comes back is a beam that was never gone on with. So it is, too, where scores are no
    numbers: beside those, nothing is the better beam.
    """
    penalty = request.beams.length_penalty
    ends = {*request.stopping.eos_token_ids, *request.stopping.stop_token_ids}
    for tokens in answers:
        is_ended = bool(tokens) and tokens[-1] in ends
        is_full = len(tokens) >= request.stopping.max_new_tokens
        if penalty < 0 and not is_ended and not (is_full and tokens[-1] != pad_token_id):
            raise InvalidField.of("beam.length_penalty", f"{penalty:g} leaves no answer with a score; go nearer to 0")
        if not is_ended and not is_full:
            raise InternalError(NOT_NUMBERS)


class _Unwanted(StoppingCriteria):  # type: ignore[misc]
    """Ends the beams of generations that are over."""

    def __init__(self, generations: Sequence[Generation], poll: Callable[[], None]) -> None:
        self._generations = generations
        self._poll = poll

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._poll()
        over = torch.tensor([generation.is_over for generation in self._generations], device=input_ids.device)
        return over.repeat_interleave(input_ids.shape[0] // len(self._generations))


def _settings(traits: Traits, request: GenerationRequest) -> dict[str, Any]:
    """The request's settings as arguments of ``generate``.

    Arguments, because None in a GenerationConfig would be filled in from the model's own: no end token would become
    its end token.
    """
    sampling, stopping, beams = request.sampling, request.stopping, request.beams
    forced = {} if (first := request.forced_first_token_id) is None else {"forced_bos_token_id": first}
    return {
        **forced,
        "do_sample": False,
        "max_length": None,
        "min_length": 0,
        "max_new_tokens": stopping.max_new_tokens,
        "min_new_tokens": stopping.min_new_tokens or None,
        "eos_token_id": [*stopping.eos_token_ids, *stopping.stop_token_ids] or None,
        "forced_eos_token_id": traits.model.generation_config.forced_eos_token_id if stopping.eos_token_ids else None,
        "pad_token_id": traits.pad_token_id,
        "num_beams": beams.num_beams,
        "length_penalty": beams.length_penalty,
        "early_stopping": beams.early_stopping,
        "num_return_sequences": request.num_return_sequences,
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size or None,
        "sequence_bias": {(token_id,): float(bias) for token_id, bias in sampling.logit_bias.items()} or None,
        "return_dict_in_generate": False,
        "output_scores": False,
        # A search goes on from what its beams have read, whatever a checkpoint says that was last used for training.
        "use_cache": True,
        "cache_implementation": None,
    }


def _until_end(tokens: list[int], request: GenerationRequest) -> list[int]:
    """The answer without the padding behind its end token."""
    ends = {*request.stopping.eos_token_ids, *request.stopping.stop_token_ids}
    for place, token_id in enumerate(tokens):
        if token_id in ends:
            return tokens[: place + 1]
    return tokens
