"""What is asked of both sides: model, task, input and parameters, in the pipelines' own words."""

from __future__ import annotations

from typing import Any

_TEXTS = (
    "The old captain lived near the harbour, and he saw the storm.",
    "Marie Curie won two prizes!",
    "日本 é unhouse ¿qué?  two  spaces 🙂 end",
)
_LONG = " ".join(f"{_TEXTS[0]} {_TEXTS[1]} it was one light of {word}" for word in ("sea", "river", "ship", "boat"))
_PAIRS = (
    ("who lived near the harbour?", _TEXTS[0]),
    ("what is hot", _LONG),
    ("Who won?", "Marie  Curie"),
    ("q", "日本"),
)


def cases() -> list[dict[str, Any]]:
    """Every case; inputs are keyword arguments or a text."""
    return [*_classification(), *_zero_shot(), *_tokens(), *_questions(), *_masks()]


def _case(model: str, task: str, given: Any, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "task": task, "input": given, "parameters": parameters}


def _classification() -> list[dict[str, Any]]:
    found = [
        _case(model, "text-classification", text, top_k=5)
        for model in ("bert-classes", "bert-multi", "bert-regression")
        for text in _TEXTS
    ]
    pair = {"text": _TEXTS[0], "text_pair": _TEXTS[1]}
    found.append(_case("bert-classes", "text-classification", pair, top_k=2))
    found.append(_case("bert-classes", "text-classification", _LONG, top_k=3, truncation=True))
    long_pair = {"text": _LONG, "text_pair": _LONG[:160]}
    found.append(_case("bert-classes", "text-classification", long_pair, top_k=3, truncation=True))
    for function in ("sigmoid", "softmax", "none"):
        found.append(_case("bert-classes", "text-classification", _TEXTS[1], top_k=3, function_to_apply=function))
    return found


def _zero_shot() -> list[dict[str, Any]]:
    labels = ["sports", "politics", "cooking", "the sea"]
    found = []
    for model in ("bert-nli", "roberta-nli-reversed"):
        for text in (_TEXTS[0], _LONG):
            for multi_label in (False, True):
                given = {"sequences": text, "candidate_labels": labels}
                found.append(_case(model, "zero-shot-classification", given, multi_label=multi_label))
        given = {"sequences": _TEXTS[1], "candidate_labels": labels[:1], "hypothesis_template": "It was {} always."}
        found.append(_case(model, "zero-shot-classification", given))
    return found


def _tokens() -> list[dict[str, Any]]:
    found = []
    for model in ("bert-ner", "roberta-ner"):
        for strategy in ("none", "simple", "first", "average", "max"):
            for text in _TEXTS:
                found.append(_case(model, "token-classification", text, aggregation_strategy=strategy))
            found.append(
                _case(model, "token-classification", _TEXTS[0], aggregation_strategy=strategy, ignore_labels=["B-PER"])
            )
        for strategy in ("simple", "average"):
            found.append(_case(model, "token-classification", _LONG, aggregation_strategy=strategy, stride=12))
    return found


def _questions() -> list[dict[str, Any]]:
    found = []
    for model in ("bert-qa", "roberta-qa"):
        for question, context in _PAIRS:
            given = {"question": question, "context": context}
            found.append(_case(model, "question-answering", given))
            found.append(_case(model, "question-answering", given, top_k=4, max_seq_len=40, doc_stride=10))
            found.append(_case(model, "question-answering", given, top_k=3, align_to_words=False, max_answer_len=4))
            found.append(_case(model, "question-answering", given, handle_impossible_answer=True, top_k=2))
    return found


def _masks() -> list[dict[str, Any]]:
    one, two = "the [MASK] saw a storm.", "[MASK] lived near the [MASK]"
    return [
        _case("bert-mask", "fill-mask", one),
        _case("bert-mask", "fill-mask", two, top_k=3),
        _case("bert-mask", "fill-mask", one, top_k=2, targets=["ship", "captain", "sailing"]),
    ]
