"""A text model and its tokenizer, and how rows of tokens get through it: padded on the right, masked, and back.

Tensor names carry their shape: B rows, T tokens of the longest, H the hidden size, L labels. ``forward`` is for the
engine, on one thread or on several side by side; everything else is read-only and for any.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
import torch

from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.tokens import TextEncoder, type_ids_of_windows

_ENCODER_ALONE = frozenset({"t5", "mt5", "umt5", "longt5"})
"""Encoder-decoders whose plain form cannot run without a decoder's input: their encoder stands for them."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The tokens of one row; ``encoding`` is the tokenizer's own account of them, where it is needed later."""

    token_ids: list[int]
    type_ids: list[int]
    encoding: tokenizers.Encoding | None = None

    @classmethod
    def of(cls, encoding: tokenizers.Encoding, *, keep: bool = False) -> Row:
        return cls(encoding.ids, encoding.type_ids, encoding if keep else None)

    @classmethod
    def of_windows(cls, windows: Sequence[tokenizers.Encoding]) -> list[Row]:
        types = type_ids_of_windows(windows)
        return [cls(window.ids, own, window) for window, own in zip(windows, types, strict=True)]


def piece_of(encoding: tokenizers.Encoding, *, keep: bool = False) -> Piece:
    """A row as a piece of work."""
    return Piece(size=len(encoding), payload=Row.of(encoding, keep=keep))


class TextModel:
    """A loaded model with its tokenizer."""

    def __init__(self, model: Any, encoder: TextEncoder, device: torch.device) -> None:
        is_plain = not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None
        if model.config.model_type in _ENCODER_ALONE and is_plain:
            model = model.get_encoder()
        self.model = model
        self.config = model.config
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.device = device
        accepted = inspect.signature(model.forward).parameters
        self._takes_types = "token_type_ids" in self.tokenizer.model_input_names and "token_type_ids" in accepted
        self._fixed: Mapping[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        self._pad_id = self._settle_padding()

    def labels(self) -> list[str]:
        """The names of the head's labels, by their ids."""
        names = self.config.id2label
        return [str(names[label_id]) for label_id in sorted(names)]

    def forward(self, rows: Sequence[Row]) -> tuple[Any, torch.Tensor]:
        """The model's output for ``rows``, and the mask [B, T] of their real tokens, both on the device."""
        ids_BT, mask_BT = self.padded(rows)
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, **self._fixed}
        if self._takes_types:
            inputs["token_type_ids"] = self._filled_up([row.type_ids for row in rows], 0)
        return self.model(**inputs), mask_BT

    def padded(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask [B, T], on the device."""
        ids_BT = self._filled_up([row.token_ids for row in rows], self._pad_id)
        return ids_BT, self._filled_up([[1] * len(row.token_ids) for row in rows], 0)

    def _filled_up(self, rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        filled = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
        for number, row in enumerate(rows):
            filled[number, : len(row)] = row
        return self._on_device(filled)

    def _on_device(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _settle_padding(self) -> int:
        """The id that fills rows up. Heads that read the last token look for it in the configuration."""
        candidates = (self.tokenizer.pad_token_id, getattr(self.config, "pad_token_id", None))
        pad_id = next((i for i in candidates if i is not None), self.tokenizer.eos_token_id)
        if getattr(self.config, "pad_token_id", None) is None:
            self.config.pad_token_id = pad_id
        return int(pad_id or 0)


def off_device(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The values as float32 in main memory; waits for the device."""
    array: np.ndarray[Any, Any] = tensor.float().cpu().numpy()
    return array
