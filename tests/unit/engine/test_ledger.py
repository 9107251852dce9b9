"""One terminal event for every request, and no token behind a sequence's last."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream_server.errors import InternalError
from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.ledger import Ledger
from slipstream_server.inference.engine.outbox import Outbox
from slipstream_server.inference.generation import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
    Stopping,
    Tokens,
)

END, STOP = 2, 3


class Book:
    """A ledger with one request, and what was said of it."""

    def __init__(self, max_new_tokens: int = 9) -> None:
        stopping = Stopping(max_new_tokens=max_new_tokens, eos_token_ids=(END,), stop_token_ids=(STOP,))
        asked = GenerationRequest(id=1, prompt_token_ids=(5,), sampling=Sampling(), stopping=stopping)
        self.row = Row(asked, 0, np.array([5], dtype=np.int64))
        self.outbox = Outbox(lambda: 0.0)
        self.ledger = Ledger(self.outbox)
        self.ledger.enter(Generation(asked, [self.row]))

    def said(self) -> list[Event]:
        return self.outbox.take()


@pytest.mark.parametrize(
    ("tokens", "taken", "reason"),
    [([7, END, 8], [7, END], "eos_token"), ([STOP, 7], [STOP], "stop_token"), ([7, 8, 9, 10], [7, 8, 9], "length")],
)
def test_of_several_tokens_those_behind_the_end_are_left(tokens: list[int], taken: list[int], reason: str) -> None:
    book = Book(max_new_tokens=3)
    assert book.ledger.append(book.row, tokens) == len(taken)
    assert book.row.generated.tolist() == taken
    assert book.said() == [Tokens(1, 0, taken, None, reason), Finished(1)]  # type: ignore[arg-type]
    assert book.outbox.totals.generation_tokens == len(taken)


def test_a_request_ends_once() -> None:
    book = Book()
    book.ledger.fail(1, InternalError("broken"))
    book.ledger.fail(1, InternalError("again"))
    book.ledger.end_sequence(1, 0)
    assert [type(event) for event in book.said()] == [Failed]
    assert not book.row.is_live


def test_who_is_cancelled_hears_nothing() -> None:
    book = Book()
    book.ledger.cancel(1)
    book.ledger.fail(1, InternalError("late"))
    assert book.said() == []
    assert not book.row.is_live
