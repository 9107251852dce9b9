"""The padded engine: dynamic batches of whole requests, stepped token by token.

A batch is collected by the scheduler, prefilled together and decoded together until its last row has ended; the next
one starts then. Rows that end, are cancelled or expire leave the tensors before the next forward. Every request that
is not cancelled ends in exactly one terminal event. A failure is narrowed down by running halves of the batch afresh,
each from the tokens it has: draws depend on position alone, so nothing changes.

Synchronous and single-threaded: the worker's main thread owns it. It knows nothing of sockets.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import msgspec
import torch

from slipstream_server.errors import DeadlineExceeded
from slipstream_server.inference.engine.adapters import AdapterSlots, NoAdapters
from slipstream_server.inference.engine.anteroom import Anteroom
from slipstream_server.inference.engine.batch import Batch
from slipstream_server.inference.engine.beams import beam_key, search
from slipstream_server.inference.engine.checks import refusal
from slipstream_server.inference.engine.choosing import TopOf
from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.faults import is_fatal, is_out_of_memory
from slipstream_server.inference.engine.ledger import Ledger, named
from slipstream_server.inference.engine.outbox import Gauges, Outbox
from slipstream_server.inference.engine.passes import Traits, prompt_logits
from slipstream_server.inference.engine.processors import HouseRules
from slipstream_server.inference.engine.scheduler import BatchLimits, Scheduler, has_expired
from slipstream_server.inference.generation import (
    Admitted,
    Event,
    GenerationRequest,
    PromptLogprobs,
    TopLogprobs,
)
from slipstream_server.logs import log_failure

logger = logging.getLogger(__name__)

_PROMPT_LOGITS_BYTES = 64 * 1024 * 1024


class PaddedEngine:
    """Serves one model. ``poll`` is called between the tokens of a beam search, so that commands are seen during it."""

    def __init__(
        self,
        model: Any,
        limits: BatchLimits,
        *,
        slots: AdapterSlots | None = None,
        grammars: Grammars | None = None,
        poll: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._traits = Traits.of(model)
        self._rules = HouseRules.of(model.generation_config, self._traits.is_encoder_decoder)
        self._scheduler = Scheduler(limits, share_key)
        self._slots = slots or NoAdapters()
        self._anteroom = Anteroom(grammars, clock=clock)
        self._poll = poll
        self._clock = clock
        self._batch: Batch | None = None
        self._parts: deque[list[Row]] = deque()
        self._outbox = Outbox(clock)
        self._ledger = Ledger(self._outbox)

    def submit(self, request: GenerationRequest) -> None:
        """Take a request; one that cannot run fails here."""
        problem = refusal(
            request,
            vocab_size=self._traits.vocab_size,
            context_tokens=self._traits.context_tokens,
            is_encoder_decoder=self._traits.is_encoder_decoder,
        )
        if problem is not None:
            self._outbox.fail(request.id, problem)
        elif any(request.id in place for place in (self._ledger, self._scheduler, self._anteroom)):
            logger.error("request id %d is in use already; the second one is ignored", request.id)
        elif not self._anteroom.enter(request):
            self._scheduler.add(request, self._clock())

    def cancel(self, request_id: int) -> None:
        """Forget a request; its rows leave before the next forward."""
        if not self._anteroom.forget(request_id) and not self._scheduler.remove(request_id):
            self._ledger.cancel(request_id)

    def end_sequence(self, request_id: int, index: int) -> None:
        """End one sequence; the request is finished with its last."""
        self._ledger.end_sequence(request_id, index)

    def step(self) -> list[Event]:
        """Schedule, run, choose, emit."""
        with torch.inference_mode():
            self._drop_expired()
            self._let_in()
            batch = self._schedule()
            if batch is not None:
                self._run(batch)
        self._outbox.report(
            Gauges(
                num_running=len(self._ledger),
                num_waiting=len(self._scheduler) + len(self._anteroom),
                kv_tokens=self._batch.kv_tokens if self._batch is not None and len(self._ledger) else 0,
                adapters=self._slots.versions,
            )
        )
        return self._outbox.take()

    def wait_s(self) -> float | None:
        """0 while a batch runs or events lie ready, else the time until the next batch or deadline is due."""
        if self._batch is not None or self._parts or self._outbox.has_events:
            return 0.0
        dues = [due for due in (self._scheduler.due_s(), self._scheduler.next_deadline_s()) if due is not None]
        waits = [max(0.0, min(dues) - self._clock())] if dues else []
        if (wait_s := self._anteroom.wait_s()) is not None:
            waits.append(wait_s)
        return min(waits, default=None)

    def check_integrity(self) -> None:
        """Assert that every running request has rows in the batch or in a part that waits, and every live row a
        request.
        """
        held = [*(self._batch.rows if self._batch else []), *(row for part in self._parts for row in part)]
        live = {id(row) for row in held if row.is_live}
        for generation in self._ledger:
            assert not generation.is_over, f"request {generation.request.id} is over and still runs"
            assert all(id(row) in live for row in generation.rows if row.is_live)
        assert all(row.request.id in self._ledger for row in held if row.is_live)

    def _schedule(self) -> Batch | None:
        """The batch to run now: the one that runs, else a part of a failed one, else a new one."""
        if self._batch is not None and not self._batch.has_live_rows:
            self._batch = None
        while self._batch is None and self._parts:
            rows = [row for row in self._parts.popleft() if row.is_live]
            self._batch = self._new_batch(rows) if rows else None
        if self._batch is None:
            self._start(self._scheduler.collect(self._clock()))
        return self._batch

    def _start(self, requests: list[GenerationRequest]) -> None:
        self._slots.release_all()
        rows = [row for request in requests for row in self._admit(request)]
        if rows and requests[0].beams.num_beams > 1:
            self._search_beams(list(self._ledger))
        elif rows:
            self._batch = self._new_batch(rows)

    def _admit(self, request: GenerationRequest) -> list[Row]:
        """The request's rows; none where it fails on its own account."""
        try:
            if request.adapter is not None:
                self._slots.hold(request.adapter)
            guides = self._anteroom.guides(request, skips=self._rules.num_forced_first(request))
            rows = [self._traits.new_row(request, index, guide) for index, guide in enumerate(guides)]
        except Exception as error:
            self._outbox.fail(request.id, named(error, "admitting a request"))
            return []
        self._outbox.put(Admitted(request.id))
        self._outbox.totals.prompt_tokens += len(request.prompt_token_ids)
        self._ledger.enter(Generation(request, rows))
        if request.prompt_logprobs is not None and not self._emit_prompt_logprobs(request):
            return []
        return rows

    def _new_batch(self, rows: list[Row]) -> Batch:
        return Batch(self._traits, rows, self._rules, self._slots)

    def _run(self, batch: Batch) -> None:
        try:
            choices = batch.step()
        except Exception as error:
            self._recover(batch, error)
        else:
            self._outbox.totals.steps += 1
            self._outbox.totals.rows += len(batch.rows)
            self._ledger.take(batch.rows, choices)

    def _emit_prompt_logprobs(self, request: GenerationRequest) -> bool:
        """Run the prompt for its own log probabilities; whether the request lives on."""
        try:
            self._outbox.put(PromptLogprobs(request.id, self._prompt_logprobs(request)))
        except Exception as error:
            self._ledger.fail(request.id, named(error, "computing prompt_logprobs"))
            return False
        return True

    def _prompt_logprobs(self, request: GenerationRequest) -> list[TopLogprobs]:
        row = self._traits.new_row(msgspec.structs.replace(request, constraint=None), 0)
        next_T = torch.from_numpy(row.tokens[1:].copy())
        number = request.prompt_logprobs or 0
        positions = [TopLogprobs(float("nan"), [], [])]
        chunk_tokens = max(1, _PROMPT_LOGITS_BYTES // (4 * self._traits.vocab_size))
        for logits_TV in prompt_logits(self._traits, row, self._slots, chunk_tokens):
            chosen_T = next_T[len(positions) - 1 : len(positions) - 1 + len(logits_TV)]
            raw_TV = logits_TV.float().log_softmax(dim=1)
            positions += TopOf(raw_TV, chosen_T, [number] * len(chosen_T)).read()
        return positions

    def _search_beams(self, generations: list[Generation]) -> None:
        """Run the admitted beam searches in one call; they are all that runs."""
        generations = [generation for generation in generations if not generation.is_over]
        if not generations:
            return
        halves: list[list[Generation]] = []
        try:
            answers = search(self._traits, generations, self._beams_stop)
        except Exception as error:
            halves = self._halves_of_beams(generations, error)
        else:
            for generation, answer in zip(generations, answers, strict=True):
                self._ledger.answer(generation, answer)
        # By now the failed search's tensors are gone with its traceback.
        for half in halves:
            self._search_beams(half)

    def _beams_stop(self) -> None:
        self._poll()
        self._drop_expired()

    def _recover(self, batch: Batch, error: Exception) -> None:
        """Run the batch's halves afresh, or fail the request that is alone with the error."""
        if is_fatal(error):
            raise error
        self._batch = None
        rows = [row for row in batch.rows if row.is_live]
        batch.release()
        if len(rows) == 1:
            self._ledger.fail(rows[0].request.id, named(error, "running a batch of one row"))
        elif rows:
            if not is_out_of_memory(error):
                log_failure(error, f"running a batch of {len(rows)} rows; each half is tried alone")
            middle = len(rows) // 2
            self._parts.extendleft([rows[middle:], rows[:middle]])

    def _halves_of_beams(self, generations: list[Generation], error: Exception) -> list[list[Generation]]:
        """What is to be searched for alone after a failure; fails the request that is alone with the error."""
        if is_fatal(error):
            raise error
        alive = [generation for generation in generations if not generation.is_over]
        if len(alive) == 1:
            self._ledger.fail(alive[0].request.id, named(error, "running a beam search"))
            return []
        middle = len(alive) // 2
        return [alive[:middle], alive[middle:]]

    def _let_in(self) -> None:
        """Requests whose grammar is compiled now wait for a batch."""
        for request in self._anteroom.take_ready():
            self._scheduler.add(request, self._clock())
        for request_id, error in self._anteroom.take_failed(self._clock()):
            self._outbox.fail(request_id, error)

    def _drop_expired(self) -> None:
        now = self._clock()
        for request_id, error in self._anteroom.take_failed(now):
            self._outbox.fail(request_id, error)
        for request in self._scheduler.take_expired(now):
            self._anteroom.forget(request.id)
            self._outbox.fail(request.id, DeadlineExceeded("the deadline passed before the request could run"))
        for generation in [g for g in self._ledger if has_expired(g.request, now)]:
            self._ledger.fail(generation.request.id, DeadlineExceeded("the deadline passed while the request ran"))


def share_key(request: GenerationRequest) -> Hashable:
    """Requests with equal keys may share a batch: all without beams, or those whose beam search is the same call."""
    return beam_key(request) if request.beams.num_beams > 1 else None
