"""text-classification and zero-shot-classification: one row of logits for each text, or for each text and label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import ClassificationResult, TaskInput, TextInput, TextPairInput, ZeroShotInput
from slipstream_server.tasks.runner import Piece
from slipstream_server.tasks.text.inputs import expect
from slipstream_server.tasks.text.model import TextModel, off_device, piece_of
from slipstream_server.tasks.text.scores import FloatArray, best_labels, sigmoid, softmax
from slipstream_server.tasks.text.tokens import Cut

DEFAULT_HYPOTHESIS = "This example is {}."


def sequence_logits(model: TextModel, pieces: Sequence[Piece]) -> list[FloatArray]:
    """The logits [L] of each row."""
    output, _ = model.forward([piece.payload for piece in pieces])
    return list(off_device(output.logits))


class TextClassification:
    """Labels of the model's own head."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._labels = model.labels()
        self._default_function = _default_function(model.config)

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        encode, cut = self._model.encoder.encode, bool(parameters.get("truncation"))
        if isinstance(item, TextPairInput):
            pair = encode(item.text, item.text_pair, cut="longest" if cut else "none", field="text_pair")
            return [piece_of(pair)]
        text = expect(item, TextInput).text
        return [piece_of(encode(text, cut="first" if cut else "none", field="text"))]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return sequence_logits(self._model, pieces)

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> ClassificationResult:
        function = parameters.get("function_to_apply") or self._default_function
        logits: FloatArray = raw[0]
        scores = {"softmax": softmax, "sigmoid": sigmoid}.get(function, np.asarray)(logits)
        return ClassificationResult(best_labels(self._labels, scores, parameters.get("top_k")))


def _default_function(config: Any) -> str:
    """As Transformers' pipeline: what the head was trained for says how its logits are to be read."""
    if config.problem_type == "regression":
        return "none"
    is_multiple = config.problem_type == "multi_label_classification"
    return "sigmoid" if is_multiple or config.num_labels == 1 else "softmax"


class ZeroShotClassification:
    """The caller's labels, each put to an entailment model as a hypothesis about the text."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        entailing = (i for name, i in model.config.label2id.items() if name.lower().startswith("entail"))
        self._entailment = next(entailing, -1)
        self._contradiction = -1 if self._entailment == 0 else 0

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        asked = expect(item, ZeroShotInput)
        template = DEFAULT_HYPOTHESIS if asked.hypothesis_template is None else asked.hypothesis_template
        if not asked.text or not asked.candidate_labels:
            raise InvalidField.of(
                "zero_shot.text" if asked.candidate_labels else "zero_shot.candidate_labels", "is empty"
            )
        if "{}" not in template:
            raise InvalidField.of(
                "zero_shot.hypothesis_template", f"{template[:100]!r} has no {{}} where the label goes"
            )
        # Not str.format: a caller's template may ask for a width of a billion, or for attributes.
        hypotheses = [template.replace("{}", label) for label in asked.candidate_labels]
        cut: Cut = "first" if parameters.get("truncation", True) else "none"
        return [
            piece_of(self._model.encoder.encode(asked.text, h, cut=cut, field="zero_shot.text")) for h in hypotheses
        ]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return sequence_logits(self._model, pieces)

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> ClassificationResult:
        labels = expect(item, ZeroShotInput).candidate_labels
        logits: FloatArray = np.stack(raw)
        if parameters.get("multi_label") or len(labels) == 1:
            scores = softmax(logits[:, [self._contradiction, self._entailment]])[:, 1]
        else:
            scores = softmax(logits[:, self._entailment])
        return ClassificationResult(best_labels(labels, scores, None))
