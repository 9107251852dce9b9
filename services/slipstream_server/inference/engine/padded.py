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
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from slipstream_server.errors import DeadlineExceeded, InternalError, InvalidField, OutOfMemory, SlipstreamError
from slipstream_server.inference.engine.adapters import AdapterSlots, NoAdapters
from slipstream_server.inference.engine.batch import Batch
from slipstream_server.inference.engine.beams import beam_key, search
from slipstream_server.inference.engine.checks import refusal
from slipstream_server.inference.engine.choosing import Choices, top_logprobs
from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.faults import is_fatal, is_out_of_memory, log_failure
from slipstream_server.inference.engine.outbox import Outbox
from slipstream_server.inference.engine.passes import Traits, prompt_logits
from slipstream_server.inference.engine.processors import HouseRules
from slipstream_server.inference.engine.scheduler import BatchLimits, Scheduler, has_expired
from slipstream_server.inference.generation import (
    Admitted,
    Event,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    Tokens,
    TopLogprobs,
)

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
        poll: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._traits = Traits.of(model)
        self._rules = HouseRules.of(model.generation_config, self._traits.is_encoder_decoder)
        self._scheduler = Scheduler(limits, share_key)
        self._slots = slots or NoAdapters()
        self._poll = poll
        self._clock = clock
        self._running: dict[int, Generation] = {}
        self._batch: Batch | None = None
        self._parts: deque[list[Row]] = deque()
        self._outbox = Outbox(clock)

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
        elif request.id in self._running or request.id in self._scheduler:
            logger.error("request id %d is in use already; the second one is ignored", request.id)
        else:
            self._scheduler.add(request, self._clock())

    def cancel(self, request_id: int) -> None:
        """Forget a request; its rows leave before the next forward."""
        if not self._scheduler.remove(request_id) and (generation := self._running.pop(request_id, None)):
            generation.drop()

    def end_sequence(self, request_id: int, index: int) -> None:
        """End one sequence; the request is finished with its last."""
        generation = self._running.get(request_id)
        if generation is not None and 0 <= index < len(generation.rows):
            generation.rows[index].dropped = True
            self._finish_if_over(generation)

    def step(self) -> list[Event]:
        """Schedule, run, choose, emit."""
        with torch.inference_mode():
            self._drop_expired()
            batch = self._schedule()
            if batch is not None:
                self._run(batch)
        self._outbox.report(self._running, self._scheduler, self._batch, self._slots.versions)
        return self._outbox.take()

    def wait_s(self) -> float | None:
        """0 while a batch runs or events lie ready, else the time until the next batch or deadline is due."""
        if self._batch is not None or self._parts or self._outbox.has_events:
            return 0.0
        dues = [due for due in (self._scheduler.due_s(), self._scheduler.next_deadline_s()) if due is not None]
        return max(0.0, min(dues) - self._clock()) if dues else None

    def check_integrity(self) -> None:
        """Assert that every running request has rows in the batch or in a part that waits, and every live row a
        request.
        """
        held = [*(self._batch.rows if self._batch else []), *(row for part in self._parts for row in part)]
        live = {id(row) for row in held if row.is_live}
        for generation in self._running.values():
            assert not generation.is_over, f"request {generation.request.id} is over and still runs"
            assert all(id(row) in live for row in generation.rows if row.is_live)
        assert all(row.request.id in self._running for row in held if row.is_live)

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
            self._search_beams()
        elif rows:
            self._batch = self._new_batch(rows)

    def _admit(self, request: GenerationRequest) -> list[Row]:
        """The request's rows; none where it fails on its own account."""
        try:
            if request.adapter is not None:
                self._slots.hold(request.adapter)
            rows = [self._traits.new_row(request, index) for index in range(request.num_return_sequences)]
        except Exception as error:
            self._outbox.fail(request.id, _named(error, "admitting a request"))
            return []
        self._outbox.put(Admitted(request.id))
        self._outbox.totals.prompt_tokens += len(request.prompt_token_ids)
        self._running[request.id] = Generation(request, rows)
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
            self._emit(batch.rows, choices)

    def _emit(self, rows: Sequence[Row], choices: Choices) -> None:
        for index, row in enumerate(rows):
            if not row.is_live:
                continue
            if choices.is_broken[index]:
                self._fail(row.request.id, InternalError("the model's scores are not numbers"))
            elif choices.is_exhausted[index]:
                self._fail(row.request.id, InvalidField.of("sampling", "its bans leave no token to choose from"))
            else:
                row.append(choices.token_ids[index])
                logprobs = choices.logprobs.get(index)
                self._emit_tokens(row, [choices.token_ids[index]], None if logprobs is None else [logprobs])

    def _emit_tokens(self, row: Row, token_ids: list[int], logprobs: list[TopLogprobs] | None) -> None:
        self._outbox.totals.generation_tokens += len(token_ids)
        self._outbox.put(Tokens(row.request.id, row.index, token_ids, logprobs, row.finish_reason))
        if row.finish_reason is not None:
            self._finish_if_over(self._running[row.request.id])

    def _emit_prompt_logprobs(self, request: GenerationRequest) -> bool:
        """Run the prompt for its own log probabilities; whether the request lives on."""
        try:
            self._outbox.put(PromptLogprobs(request.id, self._prompt_logprobs(request)))
        except Exception as error:
            self._fail(request.id, _named(error, "computing prompt_logprobs"))
            return False
        return True

    def _prompt_logprobs(self, request: GenerationRequest) -> list[TopLogprobs]:
        row = self._traits.new_row(request, 0)
        next_T = torch.from_numpy(row.tokens[1:].copy())
        number = request.prompt_logprobs or 0
        positions = [TopLogprobs(float("nan"), [], [])]
        chunk_tokens = max(1, _PROMPT_LOGITS_BYTES // (4 * self._traits.vocab_size))
        for logits_TV in prompt_logits(self._traits, row, self._slots, chunk_tokens):
            chosen_T = next_T[len(positions) - 1 : len(positions) - 1 + len(logits_TV)]
            raw_TV = logits_TV.float().log_softmax(dim=1)
            positions += top_logprobs(raw_TV, chosen_T, [number] * len(chosen_T))
        return positions

    def _search_beams(self) -> None:
        """Run the admitted beam searches in one call; they are all that runs."""
        generations = list(self._running.values())
        try:
            answers = search(self._traits, generations, self._beams_stop)
        except Exception as error:
            self._recover_beams(generations, error)
            return
        for generation, answer in zip(generations, answers, strict=True):
            for row, token_ids in zip(generation.rows, answer, strict=True):
                if row.is_live:
                    for token_id in token_ids:
                        row.append(token_id)
                    self._emit_tokens(row, token_ids, None)

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
            self._fail(rows[0].request.id, _named(error, "running a batch of one row"))
        elif rows:
            if not is_out_of_memory(error):
                log_failure(error, f"running a batch of {len(rows)} rows; each half is tried alone")
            middle = len(rows) // 2
            self._parts.extendleft([rows[middle:], rows[:middle]])

    def _recover_beams(self, generations: list[Generation], error: Exception) -> None:
        if is_fatal(error):
            raise error
        alive = [generation for generation in generations if not generation.is_over]
        for generation in alive:
            del self._running[generation.request.id]
        if len(alive) == 1:
            self._outbox.fail(alive[0].request.id, _named(error, "running a beam search"))
            return
        middle = (len(alive) + 1) // 2
        for half in (alive[:middle], alive[middle:]):
            if half:
                self._running.update({generation.request.id: generation for generation in half})
                self._search_beams()

    def _drop_expired(self) -> None:
        now = self._clock()
        for request in self._scheduler.take_expired(now):
            self._outbox.fail(request.id, DeadlineExceeded("the deadline passed before the request could run"))
        for request_id in [i for i, g in self._running.items() if has_expired(g.request, now)]:
            self._fail(request_id, DeadlineExceeded("the deadline passed while the request ran"))

    def _fail(self, request_id: int, error: SlipstreamError) -> None:
        """End a running request with its one terminal event."""
        if (generation := self._running.pop(request_id, None)) is not None:
            generation.drop()
            self._outbox.fail(request_id, error)

    def _finish_if_over(self, generation: Generation) -> None:
        if generation.is_over and self._running.pop(generation.request.id, None) is not None:
            self._outbox.put(Finished(generation.request.id))


def share_key(request: GenerationRequest) -> Hashable:
    """Requests with equal keys may share a batch: all without beams, or those whose beam search is the same call."""
    return beam_key(request) if request.beams.num_beams > 1 else None


def _named(error: Exception, doing: str) -> SlipstreamError:
    """The error as the client may see it; what it does not name goes to the log."""
    if isinstance(error, SlipstreamError):
        return error
    if is_fatal(error):
        raise error
    if is_out_of_memory(error):
        return OutOfMemory("the device has not enough memory for this request")
    return InternalError(f"internal error {log_failure(error, doing)}")
