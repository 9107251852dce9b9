"""fill-mask: the likeliest tokens for each mask of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import FillMaskResult, MaskFill, TaskInput, TextInput
from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.inputs import expect
from slipstream_server.tasks.text.model import Row, TextModel
from slipstream_server.tasks.text.tokens import Cut

_LOGITS_BYTES = 256 * 1024 * 1024
"""Of one pass: the head gives a number for each token of the text and each of the vocabulary."""


@dataclass(frozen=True, slots=True, eq=False)
class _Masked:
    row: Row
    places: list[int]
    top_k: int
    target_ids: list[int] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Fills:
    """For each mask the best ids and their probabilities."""

    masked: _Masked
    ids: list[list[int]]
    probabilities: list[list[float]]


class FillMask:
    """Tokens of the model's vocabulary."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        if model.tokenizer.mask_token_id is None:
            raise InvalidField.of("model", "its tokenizer has no mask token")
        self._mask_id = int(model.tokenizer.mask_token_id)
        self._vocabulary: Mapping[str, int] = model.tokenizer.get_vocab()

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        cut: Cut = "first" if parameters.get("truncation") else "none"
        encoding = self._model.encoder.encode(expect(item, TextInput).text, cut=cut, field="text")
        places = [place for place, token_id in enumerate(encoding.ids) if token_id == self._mask_id]
        if not places:
            raise InvalidField.of("text", f"has no mask; write {self._model.tokenizer.mask_token} where words go")
        targets = parameters.get("targets")
        target_ids = None if targets is None else self._target_ids(targets)
        top_k = min(parameters.get("top_k", 5), len(target_ids or self._vocabulary))
        return [Piece(size=len(encoding), payload=_Masked(Row.of(encoding), places, top_k, target_ids))]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return [fills for part in self._parts(pieces) for fills in self._fill(part)]

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> FillMaskResult:
        fills: _Fills = raw[0]
        token_ids, places = fills.masked.row.token_ids, fills.masked.places
        masks = [
            [
                self._filled(token_ids, place, *choice, is_only=len(places) == 1)
                for choice in zip(ids, best, strict=True)
            ]
            for place, ids, best in zip(places, fills.ids, fills.probabilities, strict=True)
        ]
        return FillMaskResult(masks)

    def _parts(self, pieces: Sequence[Piece]) -> Iterator[list[_Masked]]:
        """The pieces in parts whose logits stay within bounds."""
        longest = max(piece.size for piece in pieces)
        num_rows = max(1, _LOGITS_BYTES // (4 * longest * len(self._vocabulary)))
        for first in range(0, len(pieces), num_rows):
            yield [piece.payload for piece in pieces[first : first + num_rows]]

    def _fill(self, part: Sequence[_Masked]) -> Iterator[_Fills]:
        output, _ = self._model.forward([masked.row for masked in part])
        for masked, logits_TV in zip(part, output.logits, strict=True):
            probabilities_MV = logits_TV[masked.places].float().softmax(dim=-1)
            if masked.target_ids is None:
                best, ids = probabilities_MV.topk(masked.top_k)
            else:
                targets = torch.tensor(masked.target_ids, device=probabilities_MV.device)
                best, places = probabilities_MV[:, targets].topk(masked.top_k)
                ids = targets[places]
            yield _Fills(masked, ids.tolist(), best.tolist())

    def _filled(self, token_ids: Sequence[int], place: int, token_id: int, score: float, *, is_only: bool) -> MaskFill:
        tokenizer = self._model.tokenizer
        filled = [*token_ids[:place], token_id, *token_ids[place + 1 :]]
        shown = [i for i in filled if i != tokenizer.pad_token_id]
        # With several masks the others must stay to be seen.
        sequence = tokenizer.decode(shown, skip_special_tokens=is_only)
        return MaskFill(score, token_id, tokenizer.decode([token_id]), sequence)

    def _target_ids(self, targets: Sequence[str]) -> list[int]:
        ids = {i for target in targets if (i := self._target_id(target)) is not None}
        if not ids:
            raise InvalidField.of("parameters.targets", "none of them is made of tokens of this model")
        return sorted(ids)

    def _target_id(self, target: str) -> int | None:
        if (known := self._vocabulary.get(target)) is not None:
            return known
        first = self._model.tokenizer._tokenizer.encode(target, add_special_tokens=False).ids
        return first[0] if first else None
