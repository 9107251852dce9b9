"""The engine's nouns: a row, the generation it belongs to, and what every engine offers the worker.

Torch-free, so that the scheduler and its tests never load a model. Everything here lives on the engine's thread.

    Generation   one accepted request that has joined a batch ──┐ num_return_sequences
    Row          one sequence of it: its tokens so far  <───────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slipstream_server.inference.generation import Event, FinishReason, GenerationRequest

TokenArray = npt.NDArray[np.int64]

_FIRST_TOKEN_CAPACITY = 64


class RowGuide(Protocol):
    """A row's place in the grammar that its text must match."""

    @property
    def ends_itself(self) -> bool:
        """Whether nothing may follow and the row has no end token to say so."""

    def advance(self, token_id: int) -> None:
        """Take the row's next token."""


class TokenCounts:
    """How often each token stands in a sequence that grows. Bringing it up to date costs what is new, not what is
    there.
    """

    __slots__ = ("_counts", "_num_read", "_places", "_tokens")

    def __init__(self) -> None:
        self._num_read = 0
        self._places: dict[int, int] = {}
        self._tokens: TokenArray = np.empty(_FIRST_TOKEN_CAPACITY, dtype=np.int64)
        self._counts: TokenArray = np.zeros(_FIRST_TOKEN_CAPACITY, dtype=np.int64)

    def of(self, tokens: TokenArray) -> tuple[TokenArray, TokenArray]:
        """The different ones among the sequence's tokens and their counts: views, valid until the next call."""
        for token in tokens[self._num_read :].tolist():
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._tokens[place] = token
            self._counts[place] += 1
        self._num_read = len(tokens)
        return self._tokens[: len(self._places)], self._counts[: len(self._places)]


class Row:
    """One sequence: the context the model has seen (prompt, or the decoder's start token) and what was generated.

    ``context`` is what penalties and n-gram bans look at; it never holds padding.
    """

    __slots__ = (
        "_counts",
        "_counts_generated",
        "_eos",
        "_length",
        "_stops",
        "_tokens",
        "dropped",
        "finish_reason",
        "guide",
        "index",
        "num_context",
        "request",
    )

    def __init__(
        self, request: GenerationRequest, index: int, context: TokenArray, guide: RowGuide | None = None
    ) -> None:
        self.request = request
        self.index = index
        self.num_context = len(context)
        self.finish_reason: FinishReason | None = None
        self.dropped = False
        self.guide = guide
        self._tokens: TokenArray = np.empty(len(context) + _FIRST_TOKEN_CAPACITY, dtype=np.int64)
        self._tokens[: len(context)] = context
        self._length = len(context)
        self._counts = TokenCounts()
        self._counts_generated = TokenCounts()
        self._eos = frozenset(request.stopping.eos_token_ids)
        self._stops = frozenset(request.stopping.stop_token_ids)

    @property
    def tokens(self) -> TokenArray:
        """Context and generated tokens; a view, valid until the next ``append``."""
        return self._tokens[: self._length]

    @property
    def generated(self) -> TokenArray:
        """Generated tokens alone; a view, valid until the next ``append``."""
        return self._tokens[self.num_context : self._length]

    @property
    def counts(self) -> tuple[TokenArray, TokenArray]:
        """The different tokens of ``tokens`` and how often each is there; views, valid until the next call."""
        return self._counts.of(self.tokens)

    @property
    def counts_generated(self) -> tuple[TokenArray, TokenArray]:
        """The same of ``generated``."""
        return self._counts_generated.of(self.generated)

    @property
    def num_generated(self) -> int:
        return self._length - self.num_context

    @property
    def num_tokens(self) -> int:
        """Context and generated tokens."""
        return self._length

    @property
    def is_live(self) -> bool:
        """Whether further tokens of this row are wanted."""
        return self.finish_reason is None and not self.dropped

    def append(self, token_id: int) -> None:
        """Add the token just drawn and set ``finish_reason`` where it ends the row."""
        if self._length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self._length] = token_id
        self._length += 1
        if token_id in self._eos:
            self.finish_reason = "eos_token"
        elif token_id in self._stops:
            self.finish_reason = "stop_token"
        elif self._completes(token_id):
            self.finish_reason = "eos_token"
        elif self.num_generated >= self.request.stopping.max_new_tokens:
            self.finish_reason = "length"

    def _completes(self, token_id: int) -> bool:
        """Move the guide on; whether the row is whole without an end token."""
        if self.guide is None:
            return False
        self.guide.advance(token_id)
        return self.guide.ends_itself


@dataclass(slots=True, eq=False)
class Generation:
    """An admitted request and its rows, until its terminal event."""

    request: GenerationRequest
    rows: list[Row]

    @property
    def is_over(self) -> bool:
        return not any(row.is_live for row in self.rows)

    def drop(self) -> None:
        """No row of it is wanted any more."""
        for row in self.rows:
            row.dropped = True


class Engine(Protocol):
    """What the worker drives, be its requests generations or tasks.

    One thread calls everything; ``step`` never waits for anything but the device.
    """

    def submit(self, request: Any) -> None:
        """Take a request of the engine's own kind. It ends in one terminal event, unless it is cancelled."""

    def cancel(self, request_id: int) -> None:
        """Forget a request; no event follows. Unknown ids are ignored."""

    def end_sequence(self, request_id: int, index: int) -> None:
        """Stop one sequence, as though it had ended by itself. Unknown ones are ignored."""

    def step(self) -> list[Event]:
        """Do a bounded piece of work and say what came of it."""

    def wait_s(self) -> float | None:
        """How long until ``step`` has something to do: 0 for now, None for not before the next command."""
