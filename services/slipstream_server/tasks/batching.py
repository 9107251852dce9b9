"""Which pieces of work share the next forward pass: pieces of one group, of about one size, of any requests.

Plain Python without torch, on the engine's thread; time is an argument, in seconds of ``time.monotonic``.

    call ── its pieces, first come first served ──┐
    call ── ...                                   ├──> head ── neighbours in size ──> batch
    call ── ...                                   ┘

Fairness comes first: the call that has had the least service gives the head of the batch, its oldest piece. Then
efficiency: waiting pieces next to the head in size join it while they cost little padding. Service is counted in
tokens on a virtual clock that advances with the fair share of a call (as in weighted fair queueing, A. Parekh and
R. Gallager 1993), so that a call with a thousand long texts and one with a single short one make progress side by
side. A better priority goes first, but nobody is passed over for more than ``PATIENCE_BATCHES`` batches in a row, plus
one for each call that has waited even longer. A large call comes as several requests, which share as one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from slipstream_server.tasks.runner import Piece

PATIENCE_BATCHES = 32
_MAX_PADDING_SHARE = 0.15
_COMPANY_WINDOW_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLimits:
    """When a batch is full, and how long one that is not may wait for company.

    A batch of ``saturating_tokens`` keeps the device busy: from there on more rows cost as much as a batch of their
    own, so that it neither waits nor takes on padding freely. ``max_batch_tokens`` bounds rows times longest row.
    """

    max_batch_size: int = 64
    max_batch_tokens: int = 16384
    max_queue_delay_ms: float = 5.0
    saturating_tokens: int = 512

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_batch_size", self.max_batch_size, 1),
            ("max_batch_tokens", self.max_batch_tokens, 1),
            ("max_queue_delay_ms", self.max_queue_delay_ms, 0),
            ("saturating_tokens", self.saturating_tokens, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} is {value}; at least {least}")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A piece and where its result belongs. Only work of one ``group`` may share a forward pass."""

    request_id: int
    input_index: int
    piece_index: int
    piece: Piece
    group: Hashable


_Entry = tuple[int, int, Work]  # size, serial number, work: sorted by size, then by arrival


@dataclass(slots=True, eq=False)
class _Share:
    """A call that waits: its pieces in order, and the service it has had on the virtual clock."""

    priority: int
    arrival: int
    served: float
    waiting: dict[int, _Entry] = field(default_factory=dict)
    num_passed_over: int = 0

    @property
    def rank(self) -> tuple[int, int, float, int]:
        impatience = self.num_passed_over if self.num_passed_over >= PATIENCE_BATCHES else 0
        return (-impatience, self.priority, self.served, self.arrival)


class PieceQueue:
    """The pieces that wait, by call and by size."""

    def __init__(self, limits: TaskLimits) -> None:
        self._limits = limits
        self._shares: dict[int, _Share] = {}
        self._calls: dict[int, int] = {}  # whose share holds the piece of a serial number
        self._groups: dict[Hashable, list[_Entry]] = {}
        self._since_s: dict[int, float] = {}
        self._num_tokens = 0
        self._serial = 0
        self._arrivals = 0
        self._virtual_tokens = 0.0

    def __len__(self) -> int:
        return len(self._since_s)

    def add(self, work: Iterable[Work], priority: int, now_s: float, *, call: int | None = None) -> None:
        """Let ``work`` wait; that of one call in the order in which it is to be served. None: a request of its own."""
        for item in work:
            entry = (item.piece.size, self._serial, item)
            self._serial += 1
            payer = item.request_id if call is None else call
            share = self._shares.get(payer)
            if share is None:
                share = self._shares[payer] = _Share(priority, self._arrivals, self._virtual_tokens)
                self._arrivals += 1
            share.waiting[entry[1]] = entry
            self._calls[entry[1]] = payer
            insort(self._groups.setdefault(item.group, []), entry)
            self._since_s[entry[1]] = now_s
            self._num_tokens += item.piece.size

    def remove(self, request_id: int, input_index: int | None = None) -> None:
        """Forget a request's pieces, or those of one of its inputs."""
        gone = [
            entry
            for share in self._shares.values()
            for entry in share.waiting.values()
            if entry[2].request_id == request_id and (input_index is None or entry[2].input_index == input_index)
        ]
        for group in {entry[2].group for entry in gone}:
            serials = {entry[1] for entry in gone}
            self._groups[group] = [entry for entry in self._groups[group] if entry[1] not in serials]
        self._forget(gone)

    def collect(self, now_s: float, *, more_coming: bool) -> list[Work]:
        """The next batch; empty where nothing waits or where it pays to wait a little for ``more_coming``."""
        if not self._shares or self._may_wait(now_s, more_coming=more_coming):
            return []
        head_share = min(self._shares.values(), key=lambda share: share.rank)
        head = next(iter(head_share.waiting.values()))
        entries = self._groups[head[2].group]
        first, last = self._window(entries, bisect_left(entries, head))
        chosen = entries[first:last]
        del entries[first:last]
        self._charge(chosen)
        return [work for _, _, work in chosen]

    def due_s(self, now_s: float, *, more_coming: bool) -> float | None:
        """When ``collect`` gives something at the latest; None while nothing waits."""
        if not self._since_s:
            return None
        return self._delayed_s() if self._may_wait(now_s, more_coming=more_coming) else now_s

    def check_integrity(self) -> None:
        """Assert that calls, groups and counts agree."""
        by_call = [entry for share in self._shares.values() for entry in share.waiting.values()]
        by_group = [entry for entries in self._groups.values() for entry in entries]
        assert sorted(entry[1] for entry in by_call) == sorted(entry[1] for entry in by_group)
        assert {entry[1] for entry in by_call} == set(self._since_s) == set(self._calls)
        assert self._num_tokens == sum(entry[0] for entry in by_call)
        assert all(share.waiting for share in self._shares.values())
        assert all(entries and entries == sorted(entries) for entries in self._groups.values())

    def _may_wait(self, now_s: float, *, more_coming: bool) -> bool:
        """Whether the batch is small, company is on its way and nobody has waited long."""
        is_small = len(self) < self._limits.max_batch_size and self._num_tokens < self._limits.saturating_tokens
        return more_coming and is_small and now_s < self._delayed_s()

    def _delayed_s(self) -> float:
        # Serial numbers ascend with time and dicts keep their order: the first has waited longest.
        return next(iter(self._since_s.values())) + self._limits.max_queue_delay_ms / 1000

    def _window(self, entries: Sequence[_Entry], head: int) -> tuple[int, int]:
        """The neighbours of ``head`` that join it, as a slice of ``entries``: each time the one that pads less."""
        first, last = head, head + 1
        tokens = longest = entries[head][0]
        while True:
            below = longest - entries[first - 1][0] if first > 0 else None
            above = (entries[last][0] - longest) * (last - first) if last < len(entries) else None
            if below is not None and (above is None or below < above):
                joining, grown = entries[first - 1][0], longest
            elif above is not None:
                joining = grown = entries[last][0]
            else:
                return first, last
            if not self._fits(last - first + 1, grown, tokens + joining):
                return first, last
            tokens, longest = tokens + joining, grown
            if below is not None and (above is None or below < above):
                first -= 1
            else:
                last += 1

    def _fits(self, num_rows: int, longest: int, tokens: int) -> bool:
        padded = num_rows * longest
        if num_rows > self._limits.max_batch_size or padded > self._limits.max_batch_tokens:
            return False
        return padded <= self._limits.saturating_tokens or padded - tokens <= _MAX_PADDING_SHARE * padded

    def _charge(self, chosen: Sequence[_Entry]) -> None:
        """Take the chosen pieces out and count their tokens as service."""
        self._virtual_tokens += sum(entry[0] for entry in chosen) / len(self._shares)
        served = {self._calls[serial] for _, serial, _ in chosen}
        for call, share in self._shares.items():
            share.num_passed_over = 0 if call in served else share.num_passed_over + 1
        for size, serial, _ in chosen:
            self._shares[self._calls[serial]].served += size
        self._forget(chosen)

    def _forget(self, entries: Sequence[_Entry]) -> None:
        for size, serial, work in entries:
            call = self._calls.pop(serial)
            del self._shares[call].waiting[serial]
            if not self._shares[call].waiting:
                del self._shares[call]
            del self._since_s[serial]
            self._num_tokens -= size
            if not self._groups.get(work.group, True):
                del self._groups[work.group]


class Company:
    """How many requests are usually there at once: the most of the last half second to second.

    While fewer are there than usual, others are likely to come within a moment: callers that got their results and
    ask again.
    """

    def __init__(self) -> None:
        self._window_end_s = 0.0
        self._now_most = 0
        self._before_most = 0

    def note(self, num_requests: int, now_s: float) -> None:
        """``num_requests`` are there now."""
        if now_s >= self._window_end_s:
            is_recent = now_s < self._window_end_s + _COMPANY_WINDOW_S
            self._before_most = self._now_most if is_recent else 0
            self._now_most = 0
            self._window_end_s = now_s + _COMPANY_WINDOW_S
        self._now_most = max(self._now_most, num_requests)

    def is_missing(self, num_requests: int) -> bool:
        """Whether fewer than usual are there."""
        return num_requests < max(self._now_most, self._before_most)
