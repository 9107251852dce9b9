"""Who runs in the next step, and how far: sequences join and leave at any step.

Plain Python without torch, on the engine's thread; time is an argument, in seconds of ``time.monotonic``.

    plan()   running sequences that decode get their one token (and drafts) first; what is left of the step's token
             budget goes to prompts, in chunks: to those that run, then to newcomers
    commit() what was computed is counted; blocks that are full become readable for others with the same prefix

Order. Everybody has a rank: the arrival plus ``PRIORITY_S`` for every level of priority, so that a better priority
overtakes whatever came at most so much earlier and nobody waits for ever. Where KV memory runs out, the worst ranked
sequence loses its blocks and waits again with all its tokens (its full blocks stay readable as long as nobody needs
the room): the best ranked one always advances. A newcomer whose next block is being computed by somebody else waits
for that instead of computing it again. Long prompts leave half of a step's budget to those behind them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS, BlockPool
from slipstream_server.inference.engine.sequences import Sequence, blocks_for

PRIORITY_S = 10.0
_MOST_PROMPT_LOGITS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """How much runs at once: sequences, and tokens in one step (drafts included; at least one block of a prompt)."""

    max_running: int = 64
    max_step_tokens: int = 256

    def __post_init__(self) -> None:
        for name, value in (("max_running", self.max_running), ("max_step_tokens", self.max_step_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + count`` of a sequence, to be computed in this step; then its ``drafts``.

    ``gives_token``: the logits after its last token (and after every draft) are wanted.
    """

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of it in the forward."""
        return self.count + len(self.drafts)

    @property
    def gives_token(self) -> bool:
        return self.start + self.count == self.sequence.num_tokens


@dataclass(slots=True)
class Plan:
    """One step: chunks in the order of the batch, and the sequences among them that run for the first time."""

    chunks: list[Chunk] = field(default_factory=list)
    newcomers: list[Sequence] = field(default_factory=list)


def _everybody(sequence: Sequence, places_are_short: bool) -> bool:
    return True


def _no_drafts(sequence: Sequence) -> tuple[int, ...]:
    return ()


class ContinuousScheduler:
    """The sequences that wait and those that run.

    ``may_join`` finds a place for the adapter of a newcomer, which joins if it says so. Once somebody has none, worse
    ranked ones are asked with True: then only those may join whose request has its place already (they were preempted,
    or are its further sequences), so that places become free.
    """

    def __init__(
        self,
        limits: StepLimits,
        pool: BlockPool,
        *,
        prefix_caching: bool = True,
        may_join: Callable[[Sequence, bool], bool] = _everybody,
    ) -> None:
        self._limits = limits
        self._pool = pool
        self._prefix_caching = prefix_caching
        self._may_join = may_join
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._coming: dict[bytes, Sequence] = {}
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        bisect.insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give back its blocks."""
        if sequence.is_running:
            self._running.remove(sequence)
            self._give_back(sequence)
        else:
            self._waiting.remove(sequence)

    def plan(self, draft: Callable[[Sequence], tuple[int, ...]] = _no_drafts) -> Plan:
        """The next step; empty where nobody has anything to do. ``draft`` guesses a decoding sequence's next tokens."""
        ranked = sorted(self._running, key=_rank)
        chunks: dict[Sequence, Chunk] = {}
        for sequence in ranked:
            if sequence.is_running and sequence.num_to_compute == 1:
                self._plan_decode(sequence, draft(sequence), chunks)
        prompts = [sequence for sequence in ranked if sequence.is_running and sequence.num_to_compute > 1]
        budget = max(BLOCK_TOKENS, self._limits.max_step_tokens - sum(chunk.num_tokens for chunk in chunks.values()))
        share = budget if len(prompts) + len(self._waiting) == 1 else max(BLOCK_TOKENS, budget // 2)
        for sequence in prompts:
            budget -= self._plan_prompt(sequence, min(budget, share), chunks)
        # Whoever of those that run has no chunk has found no budget: then nobody joins either.
        plan = Plan(newcomers=self._admit(budget, share, chunks))
        plan.chunks = [chunks[sequence] for sequence in self._running if sequence in chunks]
        plan.chunks.sort(key=lambda chunk: chunk.count > 1)
        return plan

    def commit(self, chunk: Chunk, num_accepted: int = 0) -> None:
        """The chunk's tokens, and so many of its drafts (now tokens of the row), have keys and values."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.start + chunk.count + num_accepted
        while (sequence.num_named + 1) * BLOCK_TOKENS <= sequence.num_computed:
            digest = sequence.digest(sequence.num_named)
            if self._prefix_caching:
                self._pool.name(sequence.blocks[sequence.num_named], digest)
            self._coming.pop(digest, None)
            sequence.num_named += 1

    def make_room_ahead(self, sequence: Sequence) -> bool:
        """Give a running sequence room for one token more than it has; False where only others' blocks are left."""
        blocks = self._pool.take(sequence.blocks_missing(sequence.num_tokens + 1))
        sequence.blocks += blocks or []
        return blocks is not None

    def check_integrity(self) -> None:
        """Assert that blocks, tables and states agree."""
        self._pool.check_integrity(sequence.blocks for sequence in self)
        assert len({id(sequence) for sequence in self}) == len(self._waiting) + len(self._running)
        assert all(sequence.is_running for sequence in self._running)
        assert not any(sequence.is_running or sequence.blocks or sequence.num_computed for sequence in self._waiting)
        assert self._waiting == sorted(self._waiting, key=_rank), "the waiting are out of order"
        assert len(self._running) <= self._limits.max_running, "too many run"
        for sequence in self._running:
            assert sequence.num_computed < sequence.num_tokens, "a sequence has nothing to compute"
            assert blocks_for(sequence.num_computed) <= len(sequence.blocks), "computed tokens without a block"
        assert all(sequence.is_running for sequence in self._coming.values()), "a block comes from nobody"

    def _plan_decode(self, sequence: Sequence, drafts: tuple[int, ...], chunks: dict[Sequence, Chunk]) -> None:
        missing = sequence.blocks_missing(sequence.num_tokens + len(drafts))
        if drafts and missing > self._pool.num_available:
            drafts = ()
        if self._make_room(sequence, sequence.blocks_missing(sequence.num_tokens + len(drafts))):
            chunks[sequence] = Chunk(sequence, sequence.num_computed, 1, drafts)

    def _plan_prompt(self, sequence: Sequence, most: int, chunks: dict[Sequence, Chunk]) -> int:
        """Plan the next chunk of a prompt, at most so many tokens; how many it is."""
        count = min(sequence.num_to_compute, most)
        if sequence.wants_prompt_logits:
            count = min(count, _MOST_PROMPT_LOGITS)
        if count > 0:
            chunks[sequence] = Chunk(sequence, sequence.num_computed, count)
        return count

    def _make_room(self, sequence: Sequence, num_blocks: int) -> bool:
        """Give the running sequence so many blocks more, at the cost of the worst ranked; False where that is itself.

        Ranks are gone through from the best on, so whoever loses here is not in the plan yet.
        """
        while (blocks := self._pool.take(num_blocks)) is None:
            victim = max(self._running, key=_rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._give_back(sequence)
        self.num_preemptions += 1
        self.add(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        for digest in [digest for digest, source in self._coming.items() if source is sequence]:
            del self._coming[digest]
        sequence.blocks = []
        sequence.num_computed = sequence.num_named = 0
        sequence.is_running = False

    def _admit(self, budget: int, share: int, chunks: dict[Sequence, Chunk]) -> list[Sequence]:
        """Let those who wait join, best first, while there is budget and memory for the whole of them."""
        newcomers = []
        adapters_are_short = False
        for sequence in list(self._waiting):
            if budget < 1 or len(self._running) >= self._limits.max_running:
                break
            prefix, waits_for_other = self._known_prefix(sequence)
            if waits_for_other:
                continue
            if not self._fits(sequence, prefix):
                break
            if not self._may_join(sequence, adapters_are_short):
                adapters_are_short = True
                continue
            self._waiting.remove(sequence)
            self._join(sequence, prefix)
            newcomers.append(sequence)
            budget -= self._plan_prompt(sequence, min(budget, share), chunks)
        return newcomers

    def _known_prefix(self, sequence: Sequence) -> tuple[list[int], bool]:
        """Blocks with keys and values of its first tokens, and whether the next one is being computed by another.

        At least one token is left to compute: its logits are wanted.
        """
        blocks: list[int] = []
        if not self._prefix_caching or sequence.wants_prompt_logits:
            return blocks, False
        for index in range((sequence.num_tokens - 1) // BLOCK_TOKENS):
            digest = sequence.digest(index)
            block = self._pool.find(digest)
            if block is None:
                return blocks, digest in self._coming
            blocks.append(block)
        return blocks, False

    def _fits(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether all its tokens and the next one find room, with a block to spare for each that runs."""
        needed = blocks_for(sequence.num_tokens + 1) - len(prefix)
        return needed + len(self._running) <= self._pool.num_available - self._pool.num_retained(prefix)

    def _join(self, sequence: Sequence, prefix: list[int]) -> None:
        """It runs from now on, with room for all the tokens it has."""
        self._pool.hold(prefix)
        own = self._pool.take(blocks_for(sequence.num_tokens) - len(prefix))
        assert own is not None, "a newcomer was let in without room"
        sequence.blocks = prefix + own
        sequence.num_named = len(prefix)
        sequence.num_computed = len(prefix) * BLOCK_TOKENS
        sequence.is_running = True
        self._running.append(sequence)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.num_prefix_queries += sequence.num_tokens
            self.num_prefix_hits += sequence.num_cached
        if self._prefix_caching:
            for index in range(len(prefix), sequence.num_tokens // BLOCK_TOKENS):
                self._coming.setdefault(sequence.digest(index), sequence)


def _rank(sequence: Sequence) -> tuple[float, int, int]:
    request = sequence.row.request
    return (sequence.arrival_s + PRIORITY_S * request.priority, request.id, sequence.row.index)
