"""Guesses from the text itself, for those rows alone whose answer they cannot change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.drafting import draft
from slipstream_server.inference.generation import GenerationRequest, Sampling, Stopping

REPEATED = (5, 6, 7, 8, 9, 5, 6, 7, 8)


class Guide:
    ends_itself = False

    def advance(self, token_id: int) -> None:
        return


def row(prompt: Sequence[int] = REPEATED, *, guide: Any = None, **fields: Any) -> Row:
    fields = {"sampling": Sampling(), "stopping": Stopping(max_new_tokens=20), **fields}
    asked = GenerationRequest(id=1, prompt_token_ids=tuple(prompt), **fields)
    return Row(asked, 0, np.array(prompt, dtype=np.int64), guide)


def test_what_followed_the_same_words_before_is_guessed() -> None:
    assert draft(row(), 3) == (9, 5, 6)
    assert draft(row((1, 2, 3, 4)), 3) == ()
    # The longest match counts, and of equally long ones the last.
    assert draft(row((1, 2, 3, 60, 9, 2, 3, 70, 1, 2, 3)), 1) == (60,)
    assert draft(row((2, 3, 60, 9, 2, 3, 70, 8, 2, 3)), 1) == (70,)


def test_no_guess_goes_beyond_the_answers_last_token() -> None:
    assert draft(row(stopping=Stopping(max_new_tokens=3)), 8) == (9, 5)
    assert draft(row(stopping=Stopping(max_new_tokens=1)), 8) == ()


def test_temperature_zero_is_greedy() -> None:
    assert draft(row(sampling=Sampling(do_sample=True, temperature=0.0)), 2) == (9, 5)


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": Sampling(do_sample=True, seed=1)},
        {"sampling": Sampling(logit_bias={5: 1.0})},
        {"sampling": Sampling(repetition_penalty=1.1)},
        {"sampling": Sampling(presence_penalty=0.1)},
        {"sampling": Sampling(frequency_penalty=0.1)},
        {"sampling": Sampling(no_repeat_ngram_size=3)},
        {"stopping": Stopping(max_new_tokens=20, min_new_tokens=1)},
        {"logprobs": 0},
        {"forced_first_token_id": 5},
        {"guide": Guide()},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_rows_that_look_at_more_than_the_best_score_are_not_guessed(fields: dict[str, Any]) -> None:
    assert draft(row(**fields), 4) == ()
