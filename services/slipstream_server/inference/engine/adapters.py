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
        """Make the pinned version usable by rows until ``release_all``, or raise a SlipstreamError that fails the
        request alone.
        """

    def release_all(self) -> None:
        """No row is left that uses an adapter: what is held stays at hand, but may give its place to others."""

    def applied(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Within it, row i of every forward runs with the adapter that ``rows[i].request.adapter`` pins (None: the
        base).
        """


class NoAdapters:
    """Slots of a worker that serves its base model only."""

    @property
    def versions(self) -> tuple[str, ...]:
        return ()

    def hold(self, pin: AdapterPin) -> None:
        raise UnsupportedField.of("adapter", f"version {pin.version!r}: this model is served without adapters")

    def release_all(self) -> None:
        return

    def applied(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        return nullcontext()
