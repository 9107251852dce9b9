"""Keys and values of a padded batch, kept in place.

transformers' DynamicLayer copies everything at every step (torch.cat). ``GrowingLayer`` writes new tokens behind the
old ones in a store with spare room and hands out a view, so a step copies one token per row; rows that leave are
filled from the tail, and columns of common padding are skipped, both without touching the rows that stay. Layers of
other kinds (sliding windows, recurrent states) stay as transformers makes them.

    store [rows allocated, kv_heads, columns allocated, head_dim]
                                   |<- trimmed ->|<- keys, values: what the model sees ->|<- spare ->|
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_MAX_SPARE_COLUMNS = 256


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values ``[rows, kv_heads, columns, head_dim]``, appended to in place."""

    is_croppable = False

    def __init__(self, spare_columns: int = 64) -> None:
        super().__init__()
        self._spare_columns = max(1, min(spare_columns, _MAX_SPARE_COLUMNS))
        self._stores: tuple[torch.Tensor, torch.Tensor] | None = None
        self._start = 0
        self._end = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new columns; returns views of everything that is visible."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[-2]
        stores = self._with_room(key_states, value_states, num_new)
        for store, states in zip(stores, (key_states, value_states), strict=True):
            store[: states.shape[0], :, self._end : self._end + num_new].copy_(states)
        self._end += num_new
        return self._show(stores, key_states.shape[0])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was. In place where rows only leave and the holes are filled from
        behind.
        """
        if self._stores is None:
            return
        order = beam_idx.tolist()
        rows = len(order)
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if all(source >= rows for _, source in moved) and rows <= self.keys.shape[0]:
            self._fill(moved)
            self._show(self._stores, rows)
        else:
            index = beam_idx.to(self.keys.device)
            self._replace(self.keys.index_select(0, index), self.values.index_select(0, index))

    def trim(self, columns: int) -> None:
        """Hide the first ``columns`` visible columns for good."""
        if self._stores is not None:
            self._start += columns
            self._show(self._stores, self.keys.shape[0])

    def _fill(self, moved: list[tuple[int, int]]) -> None:
        if not moved or self._stores is None:
            return
        to, source = (torch.tensor(ids, device=self.keys.device) for ids in zip(*moved, strict=True))
        for store in self._stores:
            seen = store[:, :, self._start : self._end]
            seen[to] = seen[source]

    def _with_room(self, keys: torch.Tensor, values: torch.Tensor, num_new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The stores, with room for ``num_new`` columns behind the last."""
        if self._stores is None:
            self._stores = (self._room_for(keys, num_new), self._room_for(values, num_new))
        elif self._end + num_new > self._stores[0].shape[2]:
            self._spare_columns = max(self._spare_columns, (self._end - self._start) // 4)
            self._stores = self._replace(self.keys, self.values, num_new)
        return self._stores

    def _room_for(self, states: torch.Tensor, columns: int) -> torch.Tensor:
        rows, heads, _, dim = states.shape
        return states.new_empty((rows, heads, columns + self._spare_columns, dim))

    def _replace(self, keys: torch.Tensor, values: torch.Tensor, num_new: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Move to new stores that begin with ``keys`` and ``values`` and have room for ``num_new`` columns and some."""
        columns = keys.shape[2]
        stores = (self._room_for(keys, columns + num_new), self._room_for(values, columns + num_new))
        for store, states in zip(stores, (keys, values), strict=True):
            store[:, :, :columns].copy_(states)
        self._stores, self._start, self._end = stores, 0, columns
        self._show(stores, keys.shape[0])
        return stores

    def _show(self, stores: tuple[torch.Tensor, torch.Tensor], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (store[:rows, :, self._start : self._end] for store in stores)
        return self.keys, self.values


def new_cache(config: Any, spare_columns: int) -> DynamicCache:
    """An empty cache of the kinds of layers that ``config`` names, with plain attention layers growing in place."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [GrowingLayer(spare_columns) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Cache, order: Sequence[int]) -> None:
    """Row i becomes what row ``order[i]`` was; rows that are not named are gone."""
    cache.reorder_cache(torch.tensor(order, dtype=torch.long))


def trim_columns(cache: Cache, columns: int) -> bool:
    """Hide the first ``columns`` columns in every layer; False, and nothing done, where a layer cannot."""
    layers = cache.layers
    if not all(isinstance(layer, GrowingLayer) for layer in layers):
        return False
    for layer in layers:
        layer.trim(columns)
    return True
