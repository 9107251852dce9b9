"""text-ranking by a cross-encoder, which reads query and document together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import RankedDocument, RankingInput, RankingResult, TaskInput
from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.classification import sequence_logits
from slipstream_server.tasks.text.inputs import expect
from slipstream_server.tasks.text.model import TextModel, piece_of
from slipstream_server.tasks.text.scores import sigmoid, softmax
from slipstream_server.tasks.text.tokens import Cut


class CrossEncoderRanking:
    """Documents by the logit of the head's only label, or of its last one where there are several."""

    def __init__(self, model: TextModel) -> None:
        self._model = model

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        asked = expect(item, RankingInput)
        if not asked.query:
            raise InvalidField.of("ranking.query", "is empty")
        cut: Cut = "second" if parameters.get("truncation") else "none"
        encode = self._model.encoder.encode
        return [
            piece_of(encode(asked.query, document, cut=cut, field="ranking.documents")) for document in asked.documents
        ]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return sequence_logits(self._model, pieces)

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> RankingResult:
        logits_DL = np.stack(raw)
        if parameters.get("function_to_apply", "sigmoid") == "none":
            scores_D = logits_DL[:, -1]
        else:
            scores_D = sigmoid(logits_DL[:, 0]) if logits_DL.shape[1] == 1 else softmax(logits_DL)[:, -1]
        return ranked(expect(item, RankingInput), scores_D.tolist(), parameters)


def ranked(asked: RankingInput, scores: Sequence[float], parameters: Mapping[str, Any]) -> RankingResult:
    """The documents, best score first and of equals the earlier one first."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: parameters.get("top_k")]
    shown = asked.documents if parameters.get("return_documents") else [""] * len(scores)
    return RankingResult([RankedDocument(index, scores[index], shown[index]) for index in order])
