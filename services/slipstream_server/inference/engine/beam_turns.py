"""Beam searches in turns with everybody else: a piece of the prompt or one column of one search, then a step of the
batch.

``generate`` cannot be interrupted, but it asks after every column whether it may stop; there the search, running on a
stack of its own (a greenlet of the engine's thread), gives the engine its turn. Engine thread, under inference_mode.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from greenlet import greenlet

from slipstream_server.inference.engine.beams import search_in_pieces
from slipstream_server.inference.engine.core import Generation
from slipstream_server.inference.engine.ledger import Ledger, named
from slipstream_server.inference.engine.outbox import Outbox
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.generation import Admitted


class BeamTurns:
    """The searches that wait, first come first served, and the one that runs."""

    def __init__(self, model: PackedModel, *, piece_tokens: int) -> None:
        self._model = model
        self._piece_tokens = piece_tokens
        self._waiting: deque[Generation] = deque()
        self._running: Generation | None = None
        self._stack: Any = None

    @property
    def has_work(self) -> bool:
        return self._running is not None or bool(self._waiting)

    @property
    def num_running(self) -> int:
        return int(self._running is not None and not self._running.is_over)

    def add(self, generation: Generation) -> None:
        """Let a search wait for its turn."""
        self._waiting.append(generation)

    def run(self, ledger: Ledger, outbox: Outbox) -> None:
        """A piece or a column of the search that runs; the next one begins where none does."""
        while self._running is None and self._waiting:
            generation = self._waiting.popleft()
            if not generation.is_over:
                self._begin(generation, outbox)
        if self._running is None:
            return
        generation = self._running
        try:
            with self._model.as_loaded():
                answers = self._stack.switch()
        except Exception as error:
            self._running = None
            ledger.fail(generation.request.id, named(error, "running a beam search"))
            return
        if self._stack.dead:
            self._running = None
            ledger.answer(generation, answers)

    def _begin(self, generation: Generation, outbox: Outbox) -> None:
        outbox.put(Admitted(generation.request.id))
        outbox.totals.prompt_tokens += len(generation.request.prompt_token_ids)
        self._running = generation
        engine = greenlet.getcurrent()
        self._stack = greenlet(
            lambda: search_in_pieces(self._model.traits, generation, engine.switch, piece_tokens=self._piece_tokens)
        )
