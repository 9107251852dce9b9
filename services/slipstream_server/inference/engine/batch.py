"""A batch in flight: its rows, their pass through the model and their choices, kept in step as rows leave."""

from __future__ import annotations

from collections.abc import Sequence

from slipstream_server.inference.engine.adapters import AdapterSlots
from slipstream_server.inference.engine.choosing import Choices, Chooser
from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.passes import Pass, Traits, new_pass
from slipstream_server.inference.engine.processors import HouseRules


class Batch:
    """Rows that run together. Not yet run, or with the keys and values of all tokens but each row's newest."""

    def __init__(self, traits: Traits, rows: list[Row], rules: HouseRules, slots: AdapterSlots) -> None:
        self.rows = rows
        self._traits = traits
        self._rules = rules
        self._slots = slots
        self._pass: Pass | None = None
        self._chooser: Chooser | None = None

    @property
    def has_live_rows(self) -> bool:
        return any(row.is_live for row in self.rows)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values are held, padding not counted."""
        return sum(len(row.tokens) for row in self.rows) if self._pass is not None else 0

    def step(self) -> Choices:
        """Let rows go that are not live any more, and run the others one token further; the choices are in ``rows``'
        order.
        """
        self._compact()
        if self._chooser is None:
            self._chooser = Chooser(self.rows, self._rules, self._traits.device)
        self._chooser.prepare()
        if self._pass is None:
            self._pass = new_pass(self._traits, self.rows, self._slots)
            logits_RV = self._pass.prefill()
        else:
            logits_RV = self._pass.decode()
        return self._chooser.choose(logits_RV).read()

    def release(self) -> None:
        """Give the device's memory back."""
        self._pass = self._chooser = None

    def _compact(self) -> None:
        order = surviving_order([row.is_live for row in self.rows])
        if len(order) < len(self.rows):
            self.rows = [self.rows[index] for index in order]
            self._chooser = None
            if self._pass is not None:
                self._pass.keep(order)


def surviving_order(is_live: Sequence[bool]) -> list[int]:
    """The live rows, with the holes before them filled from the tail: no row moves that does not have to."""
    live = [index for index, alive in enumerate(is_live) if alive]
    tail = [index for index in live if index >= len(live)]
    return [place if is_live[place] else tail.pop() for place in range(len(live))]
