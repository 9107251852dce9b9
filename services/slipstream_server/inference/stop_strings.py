"""Stop strings: the first of several texts that appears in a stream, however the stream is cut into pieces.

The match that is complete first wins; of those complete at the same character, the longest. Text that may be the
beginning of a stop string is held back until it turns out not to be. One automaton (Aho and Corasick, 1975) follows all
strings at once, so the cost is linear in the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream_server.errors import InvalidField

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256


@dataclass(frozen=True, slots=True)
class StopMatch:
    """What a piece of the stream released, and the stop string it completed, if any."""

    text: str
    matched: str | None = None


class StopAutomaton:
    """The stop strings of one request; shared by its sequences."""

    def __init__(self, stops: Sequence[str]) -> None:
        check_stop_strings(stops)
        self.edges: list[dict[str, int]] = [{}]
        self.failure = [0]
        self.depth = [0]
        self.ends: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self.edges[state]:
                self.edges[state][char] = len(self.edges)
                self.edges.append({})
                self.failure.append(0)
                self.depth.append(self.depth[state] + 1)
                self.ends.append(None)
            state = self.edges[state][char]
        self.ends[state] = stop

    def _link(self) -> None:
        """Failure links, breadth first: the longest proper suffix of a state's text that is a state too."""
        pending = deque(self.edges[0].values())
        while pending:
            state = pending.popleft()
            for char, child in self.edges[state].items():
                self.failure[child] = self.step(self.failure[state], char)
                if self.ends[child] is None:
                    self.ends[child] = self.ends[self.failure[child]]
                pending.append(child)

    def step(self, state: int, char: str) -> int:
        while state and char not in self.edges[state]:
            state = self.failure[state]
        return self.edges[state].get(char, 0)


class StopScanner:
    """Scans one sequence's text. After a match nothing more may be pushed."""

    def __init__(self, automaton: StopAutomaton) -> None:
        self._automaton = automaton
        self._state = 0
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """The text that cannot be part of a stop string any more, or all text before the stop string that ``text``
        completes.
        """
        automaton, state = self._automaton, self._state
        for position, char in enumerate(text):
            state = automaton.step(state, char)
            if (stop := automaton.ends[state]) is not None:
                seen = self._held + text[: position + 1]
                self._held = ""
                return StopMatch(seen[: len(seen) - len(stop)], stop)
        self._state = state
        seen = self._held + text
        cut = len(seen) - automaton.depth[state]
        self._held = seen[cut:]
        return StopMatch(seen[:cut])

    def finish(self) -> str:
        """The text still held back when the sequence ends otherwise."""
        held, self._held, self._state = self._held, "", 0
        return held


def check_stop_strings(stops: Sequence[str]) -> None:
    """Raise InvalidField for too many, too long or empty stop strings; looks at no more than it allows."""
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidField.of("stopping.stop", f"{len(stops)} strings; at most {MAX_STOP_STRINGS}")
    for place, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidField.of(f"stopping.stop[{place}]", f"{len(stop)} characters; 1 to {MAX_STOP_CHARS}")
