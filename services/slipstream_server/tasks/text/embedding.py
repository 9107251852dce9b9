"""feature-extraction, sentence-similarity and ranking by embeddings: vectors of tokens, pooled or not.

Cosines are taken of pooled vectors. Shapes: B rows, T tokens, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import (
    EmbeddingResult,
    RankingInput,
    RankingResult,
    SimilarityInput,
    SimilarityResult,
    TaskInput,
    Tensor,
    TextInput,
)
from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.inputs import expect
from slipstream_server.tasks.text.model import Row, TextModel, off_device
from slipstream_server.tasks.text.ranking import ranked
from slipstream_server.tasks.text.scores import FloatArray
from slipstream_server.tasks.text.sentence_folder import SentenceSettings

_MAX_VECTOR_BYTES = 32 * 1024 * 1024
"""Of one input without pooling: more would not fit into a frame to the front."""


class Embedder:
    """Texts to vectors; pieces of one kind of pooling share a batch."""

    def __init__(self, model: TextModel, settings: SentenceSettings) -> None:
        self._model = model
        self.settings = settings

    def piece(self, text: str, pooling: str, *, truncates: bool, field: str) -> Piece:
        if self.settings.lower_case:
            text = text.lower()
        encoding = self._model.encoder.encode(
            text, cut="first" if truncates else "none", field=field, max_tokens=self._max_tokens()
        )
        if not len(encoding):
            raise InvalidField.of(field, "holds no token")
        if pooling == "none" and 4 * len(encoding) * self._hidden_size() > _MAX_VECTOR_BYTES:
            raise InvalidField.of(field, f"the vectors of {len(encoding)} tokens are too large; choose a pooling")
        return Piece(size=len(encoding), payload=Row.of(encoding), group=pooling)

    def run(self, pieces: Sequence[Piece]) -> list[FloatArray]:
        """[H] for each piece, or [T, H] without pooling."""
        rows: list[Row] = [piece.payload for piece in pieces]
        output, mask_BT = self._model.forward(rows)
        hidden_BTH: torch.Tensor = output[0]
        pooling = str(pieces[0].group)
        if pooling == "none":
            vectors = off_device(hidden_BTH)
            return [vectors[n, : len(row.token_ids)].copy() for n, row in enumerate(rows)]
        return list(off_device(pooled(hidden_BTH.float(), mask_BT, pooling)))

    def _max_tokens(self) -> int | None:
        limits = [n for n in (self.settings.max_tokens, self._model.encoder.max_tokens) if n]
        return min(limits, default=None)

    def _hidden_size(self) -> int:
        return int(getattr(self._model.config, "hidden_size", None) or 1024)


def pooled(hidden_BTH: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector [B, H] for each row, of its real tokens alone."""
    if pooling == "cls":
        return hidden_BTH[:, 0]
    if pooling == "last_token":
        last_B = mask_BT.sum(dim=1) - 1
        return hidden_BTH[torch.arange(len(last_B), device=last_B.device), last_B]
    weight_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTH.dtype)
    if pooling == "max":
        return hidden_BTH.masked_fill(weight_BT1 == 0, -torch.inf).amax(dim=1)
    return (hidden_BTH * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)


class FeatureExtraction:
    """Vectors as the caller asks for them."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        text = expect(item, TextInput).text
        pooling = parameters.get("pooling") or self._own_pooling()
        return [self._embedder.piece(text, pooling, truncates=bool(parameters.get("truncation")), field="text")]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return list(zip(self._embedder.run(pieces), (piece.size for piece in pieces), strict=True))

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> EmbeddingResult:
        vector, num_tokens = raw[0]
        normalize = parameters.get("normalize")
        if normalize is None:
            normalize = self._embedder.settings.normalize and not parameters.get("pooling")
        if normalize:
            vector = normalized(vector)
        values = np.ascontiguousarray(vector, dtype="<f4").tobytes()
        return EmbeddingResult(Tensor(tuple(vector.shape), values), num_tokens)

    def _own_pooling(self) -> str:
        self._embedder.settings.require_known()
        return self._embedder.settings.pooling or "none"


class SentenceSimilarity:
    """Cosines of a sentence with others."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        asked = expect(item, SimilarityInput)
        if not asked.source_sentence:
            raise InvalidField.of("similarity.source_sentence", "is empty")
        named = [
            ("similarity.source_sentence", asked.source_sentence),
            *(("similarity.sentences", text) for text in asked.sentences),
        ]
        return _pieces(self._embedder, named, parameters)

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return self._embedder.run(pieces)

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> SimilarityResult:
        return SimilarityResult(_cosines(raw))


class EmbeddingRanking:
    """Documents by the cosine of their embedding with the query's."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        asked = expect(item, RankingInput)
        if not asked.query:
            raise InvalidField.of("ranking.query", "is empty")
        named = [("ranking.query", asked.query), *(("ranking.documents", text) for text in asked.documents)]
        return _pieces(self._embedder, named, parameters)

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return self._embedder.run(pieces)

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> RankingResult:
        return ranked(expect(item, RankingInput), _cosines(raw), parameters)


def normalized(vector: FloatArray) -> FloatArray:
    """Scaled to length 1 along the last dimension; a vector of zeros stays."""
    lengths = np.linalg.norm(vector, axis=-1, keepdims=True)
    result: FloatArray = vector / np.maximum(lengths, 1e-12)
    return result


def _pieces(embedder: Embedder, named: Sequence[tuple[str, str]], parameters: Mapping[str, Any]) -> list[Piece]:
    pooling = parameters.get("pooling")
    if not pooling:
        embedder.settings.require_known()
        pooling = embedder.settings.pooling or "mean"
    truncates = bool(parameters.get("truncation"))
    return [embedder.piece(text, pooling, truncates=truncates, field=field) for field, text in named]


def _cosines(vectors: Sequence[FloatArray]) -> list[float]:
    """Of the first vector with each of the others."""
    units = normalized(np.stack(vectors))
    return [float(cosine) for cosine in np.clip(units[1:] @ units[0], -1.0, 1.0)]
