"""Where rows of one batch get their adapters from: the seam between the batch and whatever holds adapter weights.

Rows of one batch may name different adapters. Torch-free; engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from slipstream_server.errors import UnsupportedField
from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.generation import AdapterPin


class AdapterSlots(Protocol):
    """Adapter weights on the device."""

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions at hand, the least recently used first."""

    def hold(self, pin: AdapterPin) -> None:
        """Make the pinned version usable by rows until ``release`` or ``release_all``, or raise a SlipstreamError that
        fails the request alone.
        """

    def may_hold(self, pin: AdapterPin) -> bool:
        """Whether ``hold`` would find a place for it now."""

    def release(self, pin: AdapterPin) -> None:
        """One who held it needs it no more."""

    def release_all(self) -> None:
        """No row is left that uses an adapter: what is held stays at hand, but may give its place to others."""

    def applied(
        self, rows: Sequence[Row], counts: Sequence[int] | None = None, kept: Sequence[int] = ()
    ) -> AbstractContextManager[None]:
        """Within it, row i of every forward runs with the adapter that ``rows[i].request.adapter`` pins (None: the
        base). With ``counts``, the forward is packed: so many successive tokens are of row i, and the head sees the
        tokens ``kept``.
        """


class NoAdapters:
    """Slots of a worker that serves its base model only."""

    @property
    def versions(self) -> tuple[str, ...]:
        return ()

    def hold(self, pin: AdapterPin) -> None:
        raise UnsupportedField.of("adapter", f"version {pin.version!r}: this model is served without adapters")

    def may_hold(self, pin: AdapterPin) -> bool:
        return True

    def release(self, pin: AdapterPin) -> None:
        return

    def release_all(self) -> None:
        return

    def applied(
        self, rows: Sequence[Row], counts: Sequence[int] | None = None, kept: Sequence[int] = ()
    ) -> AbstractContextManager[None]:
        return nullcontext()
