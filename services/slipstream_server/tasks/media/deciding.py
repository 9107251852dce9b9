"""decision: typed questions about a state of affairs, answered with a probability for every option."""

from __future__ import annotations

from typing import Any

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import (
    DecisionAnswer,
    DecisionInput,
    DecisionQuestion,
    DecisionResult,
    LabelScore,
)
from slipstream_server.tasks.media.images import decode_image
from slipstream_server.tasks.media.pipelines import Parameters, Steps, alone


def _read_request(pipeline: Any, item: DecisionInput, parameters: Parameters) -> Any:
    names = [question.name for question in item.questions]
    if len(set(names)) != len(names) or not all(names):
        raise InvalidField.of("decision.questions", "every question needs a name of its own")
    questions = {question.name: _question(question) for question in item.questions}
    request: dict[str, Any] = {"state": item.state, "questions": questions}
    if item.assets:
        request["assets"] = {
            name: decode_image(data, f"decision.assets[{name!r}].data") for name, data in item.assets.items()
        }
    return request


def _question(question: DecisionQuestion) -> dict[str, Any]:
    """A question as Transformers spells it."""
    spelled: dict[str, Any] = {"type": question.type, "instructions": question.instructions}
    if question.type == "score":
        spelled["criteria"] = [option.description or option.name for option in question.options]
    elif question.options:
        spelled["criteria"] = {option.name: option.description or None for option in question.options}
    return spelled


def _shape_answers(pipeline: Any, item: DecisionInput, parameters: Parameters, found: Any) -> DecisionResult:
    return DecisionResult(answers=[_answer(question, found[question.name]) for question in item.questions])


def _answer(question: DecisionQuestion, found: dict[str, Any]) -> DecisionAnswer:
    if question.type == "noul":
        options = [LabelScore("true", found["noul"], 0), LabelScore("false", 1.0 - found["noul"], 1)]
        return DecisionAnswer(name=question.name, options=options, score=found["noul"])
    by_option = found["probabilities"]
    names = list(by_option) if question.type == "choice" else [o.name or str(i) for i, o in enumerate(question.options)]
    scores = [LabelScore(name, score, i) for i, (name, score) in enumerate(zip(names, by_option.values(), strict=True))]
    return DecisionAnswer(
        name=question.name,
        options=scores,
        choice=found.get("choice", ""),
        score=found.get("score"),
        confidence=found["confidence"],
    )


DECISION = Steps(read=_read_request, company=alone, shape=_shape_answers)
