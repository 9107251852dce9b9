"""Adapter weights on the device: a bounded number of slots, the least recently used of which give way.

Adapters are known by their digest, never by a name. A batch whose rows all want the base finds its model untouched;
one with adapters finds them on the layers that its adapters change, and on no other. Reading an adapter takes as long
as its file does and happens between batches. Engine thread, under inference_mode.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slipstream_server.errors import IncompatibleAdapter, OutOfMemory
from slipstream_server.inference.engine.adapted_linear import BASE_SLOT, AdaptedLinear, Selection, linear_shape
from slipstream_server.inference.engine.adapter_files import Factors, read_adapter
from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.generation import AdapterPin

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    """An adapter in its slot, and the layers that it changes."""

    slot: int
    version: str
    layers: tuple[AdaptedLinear, ...]


class LoraSlots:
    """The slots of one model."""

    def __init__(self, model: Any, *, num_slots: int, max_rank: int) -> None:
        # Of a model that wears an adapter already, no layer is what an adapter was trained on.
        self._modules = {} if hasattr(model, "peft_config") else dict(model.named_modules())
        self._max_rank = max_rank
        self._num_slots = num_slots + 1
        self._dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._layers: dict[str, AdaptedLinear] = {}
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._free = list(range(num_slots, BASE_SLOT, -1))
        self._in_use: Counter[str] = Counter()
        self._selection = Selection()
        self._installed: list[AdaptedLinear] = []

    @property
    def held(self) -> tuple[str, ...]:
        """Digests of the adapters at hand, the least recently used first."""
        return tuple(self._held)

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple([held.version for held in self._held.values()])

    def hold(self, pin: AdapterPin) -> None:
        """Raises IncompatibleAdapter, CorruptArtifact, UnsafeWeights, OutOfMemory."""
        if pin.digest not in self._held:
            began_s = time.monotonic()
            self._load(pin, read_adapter(Path(pin.folder), max_rank=self._max_rank))
            logger.info("adapter %s loaded in %.0f ms", pin.version, 1000 * (time.monotonic() - began_s))
        self._held.move_to_end(pin.digest)
        self._in_use[pin.digest] += 1

    def release_all(self) -> None:
        self._in_use.clear()
        self._uninstall()

    def may_hold(self, pin: AdapterPin) -> bool:
        return pin.digest in self._held or bool(self._free) or any(self._is_idle(digest) for digest in self._held)

    def release(self, pin: AdapterPin) -> None:
        self._in_use[pin.digest] -= 1
        if self._is_idle(pin.digest):  # else every adapter there ever was would be counted for ever
            del self._in_use[pin.digest]

    def applied(
        self, rows: Sequence[Row], counts: Sequence[int] | None = None, kept: Sequence[int] = ()
    ) -> AbstractContextManager[None]:
        slots = tuple([self._slot_of(row.request.adapter) for row in rows])
        if not any(slots):
            self._uninstall()
            return nullcontext()
        if counts is not None:
            slots = tuple([slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)])
        if slots != self._selection.slots or not self._installed:
            self._install(set(slots))
        self._selection.choose(slots, tuple([slots[place] for place in kept]))
        return self._active()

    def _slot_of(self, pin: AdapterPin | None) -> int:
        return BASE_SLOT if pin is None else self._held[pin.digest].slot

    @contextmanager
    def _active(self) -> Iterator[None]:
        self._selection.is_active = True
        try:
            yield
        finally:
            self._selection.is_active = False

    def _install(self, slots: set[int]) -> None:
        self._uninstall()
        wanted = {layer for held in self._held.values() if held.slot in slots for layer in held.layers}
        for layer in wanted:
            layer.install()
        self._installed = list(wanted)

    def _uninstall(self) -> None:
        for layer in self._installed:
            layer.uninstall()
        self._installed = []

    def _load(self, pin: AdapterPin, weights: Mapping[str, Factors]) -> None:
        layers = {path: self._layer(path, factors) for path, factors in weights.items()}
        held = _Held(self._take_slot(), pin.version, tuple(layers.values()))
        try:
            for path, layer in layers.items():
                layer.put(held.slot, weights[path])
        except BaseException:
            self._empty(held)
            raise
        self._uninstall()
        self._layers.update(layers)
        self._held[pin.digest] = held

    def _layer(self, path: str, factors: Factors) -> AdaptedLinear:
        """The layer at ``path``; raises IncompatibleAdapter where there is none that ``factors`` fit."""
        layer = self._layers.get(path) or self._new_layer(path)
        if layer.shape != factors.shape:
            raise IncompatibleAdapter(
                f"layer {path[:120]!a} has {layer.shape[0]} inputs and {layer.shape[1]} outputs; the adapter is made"
                f" for {factors.shape[0]} and {factors.shape[1]}"
            )
        return layer

    def _new_layer(self, path: str) -> AdaptedLinear:
        module = self._modules.get(path)
        shape = None if module is None else linear_shape(module)
        # Experts see the tokens that are routed to them, and no longer whose rows they are.
        if module is None or shape is None or "experts" in path.split("."):
            raise IncompatibleAdapter(f"the model has no layer {path[:120]!a} that an adapter can change row by row")
        return AdaptedLinear(module, shape, self._selection, self._num_slots, self._dtype)

    def _is_idle(self, digest: str) -> bool:
        return self._in_use[digest] < 1

    def _take_slot(self) -> int:
        if not self._free:
            idle = next((digest for digest in self._held if self._is_idle(digest)), None)
            if idle is None:
                raise OutOfMemory(f"all {self._num_slots - 1} adapter slots are in use", retry_after_s=1.0)
            self._empty(self._held.pop(idle))
        return self._free.pop()

    def _empty(self, held: _Held) -> None:
        for layer in held.layers:
            layer.clear(held.slot)
        self._free.append(held.slot)
