"""The continuous engine: requests join and leave the batch at any step.

    step()   schedule -> run one packed forward -> choose -> hand out

On a GPU the forward of the next step is begun between the last two (running_ahead).

Decoding sequences and chunks of prompts share every forward; keys and values lie in blocks that equal prefixes share.
A failure of a forward is narrowed down by running its halves at once, down to the one sequence that fails alone:
nothing is counted as computed before it has succeeded, and writing a block twice changes nothing. A beam search, which
is the model's own ``generate``, is a coroutine beside all this: a step runs one of its columns, then everybody else.

Draws depend on seed, sequence and position alone, so neither the company nor a preemption changes a sampled answer.
Synchronous and single-threaded: the worker's main thread owns it. It knows nothing of sockets.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from slipstream_server.errors import DeadlineExceeded, InternalError, OutOfMemory
from slipstream_server.inference.engine.adapters import AdapterSlots, NoAdapters
from slipstream_server.inference.engine.anteroom import Anteroom
from slipstream_server.inference.engine.beam_turns import BeamTurns
from slipstream_server.inference.engine.checks import refusal
from slipstream_server.inference.engine.choosing import NOT_NUMBERS, Chooser, Chosen, TopOf
from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.continuous_scheduler import Chunk, ContinuousScheduler, StepLimits
from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.drafting import draft, verified
from slipstream_server.inference.engine.faults import is_fatal, is_out_of_memory
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS, BlockPool
from slipstream_server.inference.engine.ledger import Ledger, named
from slipstream_server.inference.engine.outbox import Gauges, Outbox
from slipstream_server.inference.engine.packed_pass import PackedModel, num_wanted
from slipstream_server.inference.engine.processors import HouseRules
from slipstream_server.inference.engine.running_ahead import AheadLogits
from slipstream_server.inference.engine.scheduler import has_expired
from slipstream_server.inference.engine.sequences import Sequence as KVSequence
from slipstream_server.inference.engine.transfers import to_device
from slipstream_server.inference.generation import (
    Admitted,
    Event,
    GenerationRequest,
    PromptLogprobs,
    TopLogprobs,
)
from slipstream_server.logs import log_failure

logger = logging.getLogger(__name__)

_MOST_FAILED_AHEAD = 3


class ContinuousEngine:
    """Serves one decoder-only model. ``max_draft_tokens`` 0: no speculation; ``runs_ahead``: where nothing is drafted,
    the next forward begins before the token just chosen is handed out, which pays where a device works beside the host.
    """

    def __init__(
        self,
        model: PackedModel,
        limits: StepLimits,
        num_blocks: int,
        *,
        slots: AdapterSlots | None = None,
        grammars: Grammars | None = None,
        prefix_caching: bool = True,
        max_draft_tokens: int = 0,
        runs_ahead: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        model.use(num_blocks)
        self._model = model
        self._traits = model.traits
        self._rules = HouseRules.of(model.traits.model.generation_config, is_encoder_decoder=False)
        self._slots = slots or NoAdapters()
        self._pool = BlockPool(num_blocks)
        self._scheduler = ContinuousScheduler(
            limits, self._pool, prefix_caching=prefix_caching, may_join=self._may_join
        )
        self._beams = BeamTurns(model, piece_tokens=limits.max_step_tokens)
        self._anteroom = Anteroom(grammars, clock=clock)
        self._max_draft_tokens = max_draft_tokens
        self._clock = clock
        self._outbox = Outbox(clock)
        self._ledger = Ledger(self._outbox)
        self._prompt_logprobs: dict[KVSequence, list[TopLogprobs]] = {}
        self._admitted: set[int] = set()
        self._holding: set[int] = set()
        self._chooser: tuple[list[Row], Chooser] | None = None
        # Where the next step may bring drafts, its tokens are not known to be one for each row.
        self._runs_ahead = runs_ahead and not max_draft_tokens
        self._ahead: AheadLogits | None = None
        self._num_failed_ahead = 0

    @property
    def num_steps(self) -> int:
        """Steps that ran something, since the engine began."""
        return self._outbox.totals.steps

    def submit(self, request: GenerationRequest) -> None:
        """Take a request; one that cannot run fails here."""
        problem = refusal(
            request,
            vocab_size=self._traits.vocab_size,
            context_tokens=self._traits.context_tokens,
            is_encoder_decoder=False,
        )
        if problem is None and _most_tokens(request) > self._pool.num_blocks * BLOCK_TOKENS:
            beams = f" by {request.beams.num_beams} beams" if request.beams.num_beams > 1 else ""
            problem = OutOfMemory(
                f"prompt and answer of up to {_most_tokens(request)} tokens{beams} exceed the KV memory of"
                f" {self._pool.num_blocks * BLOCK_TOKENS} tokens"
            )
        if problem is not None:
            self._outbox.fail(request.id, problem)
        elif request.id in self._ledger or request.id in self._anteroom:
            logger.error("request id %d is in use already; the second one is ignored", request.id)
        elif not self._anteroom.enter(request):
            self._enter(request)

    def cancel(self, request_id: int) -> None:
        """Forget a request; its blocks are free before the next forward."""
        self._anteroom.forget(request_id)
        self._ledger.cancel(request_id)

    def end_sequence(self, request_id: int, index: int) -> None:
        """End one sequence; the request is finished with its last."""
        self._ledger.end_sequence(request_id, index)

    def step(self) -> list[Event]:
        """Schedule, run, choose, hand out."""
        with torch.inference_mode():
            self._take_compiled()
            self._drop_expired()
            self._let_go()
            plan = self._scheduler.plan(self._draft)
            self._admit(plan.newcomers)
            if plan.chunks:
                self._run(plan.chunks)
                self._outbox.totals.steps += 1
                self._outbox.totals.rows += len(plan.chunks)
            else:
                self._ahead = None
            self._beams.run(self._ledger, self._outbox)
            self._let_go()
        self._report()
        return self._outbox.take()

    def wait_s(self) -> float | None:
        """0 while there is anything to run or to say, else until a grammar may be compiled; None for nothing at all."""
        is_busy = self._scheduler.has_work or self._beams.has_work or self._outbox.has_events
        return 0.0 if is_busy else self._anteroom.wait_s()

    def check_integrity(self) -> None:
        """Assert that blocks, sequences and requests agree."""
        self._scheduler.check_integrity()
        held = {id(sequence.row) for sequence in self._scheduler}
        for generation in self._ledger:
            assert not generation.is_over, f"request {generation.request.id} is over and still runs"
            if generation.request.beams.num_beams == 1:
                assert all(id(row) in held for row in generation.rows if row.is_live)
        assert all(s.row.request.id in self._ledger for s in self._scheduler if s.row.is_live)
        if not len(self._ledger):
            self._let_go()
            assert not self._pool.num_held, "blocks are held for nobody"
            assert not self._admitted | self._holding, "requests are counted that have ended"

    def _enter(self, request: GenerationRequest) -> None:
        guides = self._anteroom.guides(request, skips=self._rules.num_forced_first(request))
        rows = [self._traits.new_row(request, index, guide) for index, guide in enumerate(guides)]
        generation = Generation(request, rows)
        self._ledger.enter(generation)
        if request.beams.num_beams > 1:
            self._beams.add(generation)
            return
        # It has waited before the worker too.
        arrival_s = request.arrival_monotonic_s or self._clock()
        for row in rows:
            self._scheduler.add(KVSequence(generation, row, arrival_s))

    def _take_compiled(self) -> None:
        """Requests whose grammar is compiled now wait like all others; those whose grammar is refused end."""
        for request in self._anteroom.take_ready():
            self._enter(request)
        for request_id, error in self._anteroom.take_failed(self._clock()):
            self._outbox.fail(request_id, error)

    def _may_join(self, sequence: KVSequence, places_are_short: bool) -> bool:
        """Hold the adapter of a request that is about to join; False where there is no place, or where it fails."""
        request = sequence.row.request
        if request.adapter is None or request.id in self._holding:
            return True
        if places_are_short or not sequence.row.is_live or not self._slots.may_hold(request.adapter):
            return False
        try:
            self._slots.hold(request.adapter)
        except Exception as error:
            self._ledger.fail(request.id, named(error, "loading an adapter"))
            return False
        self._holding.add(request.id)
        return True

    def _admit(self, newcomers: Sequence[KVSequence]) -> None:
        for sequence in newcomers:
            request = sequence.row.request
            if request.id not in self._admitted:
                self._admitted.add(request.id)
                self._outbox.put(Admitted(request.id, sequence.num_cached or 0))
                self._outbox.totals.prompt_tokens += len(request.prompt_token_ids)

    def _run(self, chunks: Sequence[Chunk]) -> None:
        """Run the chunks, in halves where that fails."""
        parts = deque([chunks])
        while parts:
            part = [chunk for chunk in parts.popleft() if chunk.sequence.row.is_live]
            if not part:
                continue
            try:
                self._advance(part)
            except Exception as error:
                # The halves run when the failed forward's tensors are gone with its traceback.
                parts.extendleft(self._halves(part, error))

    def _halves(self, chunks: Sequence[Chunk], error: Exception) -> tuple[Sequence[Chunk], ...]:
        """What is to be run alone after a failure, last first; fails the request that is alone with the error."""
        if is_fatal(error):
            raise error
        self._chooser = self._ahead = None
        if len(chunks) == 1:
            self._ledger.fail(chunks[0].sequence.row.request.id, named(error, "running one sequence"))
            return ()
        if not is_out_of_memory(error):
            log_failure(error, f"running {len(chunks)} sequences; each half is tried alone")
        middle = len(chunks) // 2
        return chunks[middle:], chunks[:middle]

    def _advance(self, chunks: Sequence[Chunk]) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            chunks = ahead.first(chunks)
        plain = [c for c in chunks if c.gives_token and not c.drafts]
        chooser = self._chooser_of([chunk.sequence.row for chunk in plain])
        chooser.prepare()
        logits_MV = self._run_all(chunks) if ahead is None else ahead.complete(chunks, self._run_all)
        places = _last_places(chunks)
        for chunk in chunks:
            if chunk.sequence.wants_prompt_logits:
                self._read_prompt(chunk, logits_MV[places[chunk] + 1 - num_wanted(chunk) : places[chunk] + 1])
        accepted = verified([chunk for chunk in chunks if chunk.drafts], logits_MV, places)
        if len(plain) != len(logits_MV):
            wanted = np.array([places[chunk] for chunk in plain], dtype=np.int64)
            logits_MV = logits_MV.index_select(0, to_device(wanted, logits_MV.device))
        chosen = chooser.choose(logits_MV) if plain else None
        if chosen is not None and self._runs_ahead and len(plain) == len(chunks):
            self._run_ahead(plain, chosen)
        choices = None if chosen is None else chosen.read()
        # Nothing can fail from here on.
        for chunk in chunks:
            if chunk not in accepted:
                self._scheduler.commit(chunk)
        if choices is not None:
            self._ledger.take([chunk.sequence.row for chunk in plain], choices)
        for chunk, tokens in accepted.items():
            self._take_drafted(chunk, tokens)
        if (choices is not None and any(choices.is_broken)) or not all(accepted.values()):
            # Keys and values may be no numbers either: nobody else is to read them.
            self._pool.forget_prefixes()

    def _run_all(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        return self._model.run(chunks, self._slots)

    def _run_ahead(self, chunks: Sequence[Chunk], chosen: Chosen) -> None:
        """Begin the next forward of those who want one unless the token just chosen ends them."""
        going = [(place, chunk) for place, chunk in enumerate(chunks) if self._takes_room_ahead(chunk.sequence)]
        if not going:
            return
        places, chunks = zip(*going, strict=True)
        ids_A = chosen.tokens_R.index_select(0, to_device(np.array(places), chosen.tokens_R.device))
        try:
            logits_AV = self._model.run_ahead(chunks, ids_A, self._slots)
        except Exception as error:
            if is_fatal(error):
                raise
            self._note_failed_ahead(error)
        else:
            self._num_failed_ahead = 0
            self._ahead = AheadLogits([chunk.sequence for chunk in chunks], logits_AV)

    def _note_failed_ahead(self, error: Exception) -> None:
        """The step that wants the forward runs it again, and finds out whose fault it is; what always fails is left."""
        self._num_failed_ahead += 1
        self._runs_ahead = self._num_failed_ahead < _MOST_FAILED_AHEAD
        then = "goes on" if self._runs_ahead else "ends, and steps are slower so"
        logger.warning("running ahead failed %d times in a row and %s: %s", self._num_failed_ahead, then, error)

    def _takes_room_ahead(self, sequence: KVSequence) -> bool:
        """Whether a further token may follow the one just chosen; if so, it has room from now on."""
        row = sequence.row
        may_follow = row.is_live and row.num_generated + 1 < row.request.stopping.max_new_tokens
        return may_follow and self._scheduler.make_room_ahead(sequence)

    def _chooser_of(self, rows: list[Row]) -> Chooser:
        """The rows' chooser, made anew only when they have changed."""
        if self._chooser is None or self._chooser[0] != rows:
            self._chooser = (rows, Chooser(rows, self._rules, self._traits.device))
        return self._chooser[1]

    def _draft(self, sequence: KVSequence) -> tuple[int, ...]:
        if not self._max_draft_tokens or not self._rules.is_empty or sequence.wants_prompt_logits:
            return ()
        return draft(sequence.row, self._max_draft_tokens)

    def _take_drafted(self, chunk: Chunk, tokens: list[int]) -> None:
        """The tokens go to the row first: blocks that are full with them are named by them."""
        row = chunk.sequence.row
        if not row.is_live:
            return
        if not tokens:
            self._ledger.fail(row.request.id, InternalError(NOT_NUMBERS))
            return
        num_accepted = self._ledger.append(row, tokens) - 1
        self._scheduler.commit(chunk, num_accepted)
        self._outbox.totals.draft_tokens += len(chunk.drafts)
        self._outbox.totals.accepted_draft_tokens += num_accepted

    def _read_prompt(self, chunk: Chunk, logits_TV: torch.Tensor) -> None:
        """Log probabilities of the prompt tokens that follow the chunk's positions; sent when all are there."""
        sequence = chunk.sequence
        number = sequence.row.request.prompt_logprobs or 0
        known = self._prompt_logprobs.setdefault(sequence, [TopLogprobs(float("nan"), [], [])])
        del known[chunk.start + 1 :]
        next_T = torch.from_numpy(sequence.row.tokens[chunk.start + 1 : chunk.start + chunk.count + 1].copy())
        if len(next_T):
            raw_TV = logits_TV[: len(next_T)].log_softmax(dim=1)
            known += TopOf(raw_TV, next_T, [number] * len(next_T)).read()
        if chunk.gives_token:
            self._outbox.put(PromptLogprobs(sequence.row.request.id, self._prompt_logprobs.pop(sequence)))
            sequence.wants_prompt_logits = False

    def _drop_expired(self) -> None:
        now_s = self._clock()
        for generation in self._ledger:
            request = generation.request
            if has_expired(request, now_s):
                when = "while the request ran" if request.id in self._admitted else "before the request could run"
                self._ledger.fail(request.id, DeadlineExceeded(f"the deadline passed {when}"))

    def _let_go(self) -> None:
        """Give back what belongs to rows and requests that have ended."""
        for sequence in [sequence for sequence in self._scheduler if not sequence.row.is_live]:
            self._scheduler.remove(sequence)
            self._prompt_logprobs.pop(sequence, None)
            request = sequence.row.request
            if sequence.generation.is_over:
                self._admitted.discard(request.id)
                if request.id in self._holding and request.adapter is not None:
                    self._holding.remove(request.id)
                    self._slots.release(request.adapter)

    def _report(self) -> None:
        scheduler = self._scheduler
        num_running = len(self._admitted) + self._beams.num_running
        self._outbox.report(
            Gauges(
                num_running=num_running,
                num_waiting=len(self._ledger) + len(self._anteroom) - num_running,
                kv_tokens=self._pool.num_held * BLOCK_TOKENS,
                kv_capacity_tokens=self._pool.num_blocks * BLOCK_TOKENS,
                prefix_queries=scheduler.num_prefix_queries,
                prefix_hits=scheduler.num_prefix_hits,
                preemptions=scheduler.num_preemptions,
                adapters=self._slots.versions,
            )
        )


def _last_places(chunks: Sequence[Chunk]) -> dict[Chunk, int]:
    """Where each chunk's last wanted position stands among the logits."""
    places = {}
    end = 0
    for chunk in chunks:
        end += num_wanted(chunk)
        places[chunk] = end - 1
    return places


def _most_tokens(request: GenerationRequest) -> int:
    """What one sequence, or all beams of a search together, may come to."""
    return request.beams.num_beams * (len(request.prompt_token_ids) + request.stopping.max_new_tokens)
