"""Inputs and results between protobuf and the domain: every kind of the contract, none lost, none altered."""

from __future__ import annotations

import struct
from typing import Any, get_args

import msgspec
import pytest
from google.protobuf import struct_pb2

from slipstream.inference.v1 import tasks_pb2
from slipstream_client.task_results import RESULTS, result_from_proto
from slipstream_client.tasks import input_message
from slipstream_server.errors import InvalidField, WorkerDied
from slipstream_server.rpc.inference.task_inputs import INPUT_READERS, parameters_of, task_input
from slipstream_server.rpc.inference.task_results import RESULT_WRITERS, task_result
from slipstream_server.tasks import items
from slipstream_server.tasks.inputs import check_input
from slipstream_server.tasks.registry import TASKS
from unit.tasks.test_inputs import WHOLE

INPUT_KINDS = {field.name for field in tasks_pb2.TaskInput.DESCRIPTOR.oneofs_by_name["kind"].fields}
OUTCOMES = {field.name for field in tasks_pb2.TaskResult.DESCRIPTOR.oneofs_by_name["outcome"].fields}

PICTURE = items.EncodedImage(b"png", 3, 2)
TENSOR = items.Tensor((1, 2), struct.pack("<2f", 0.5, -1.0))
BOX = items.Box(1.0, 2.0, 3.0, 4.0)
MADE: dict[str, items.TaskResult] = {
    "classification": items.ClassificationResult([items.LabelScore("good", 0.5, 1)]),
    "token_classification": items.TokenClassificationResult([items.TokenSpan("PER", 0.5, "Ada", 1, 4, 2)]),
    "question_answering": items.QuestionAnsweringResult(
        [
            items.Answer("a", 0.5, character_span=items.CharacterSpan(0, 1)),
            items.Answer("b", 0.25, word_span=items.WordSpan(0, 1, 2)),
            items.Answer("c", 0.0, table=items.TableAnswer("SUM", [items.TableCell(1, 2, "7")])),
            items.Answer("d"),
        ]
    ),
    "fill_mask": items.FillMaskResult([[items.MaskFill(0.5, 3, "word", "a word")], []]),
    "embedding": items.EmbeddingResult(TENSOR, 7),
    "ranking": items.RankingResult([items.RankedDocument(1, 0.5, "text")]),
    "similarity": items.SimilarityResult([0.5, -1.0]),
    "generated_text": items.GeneratedTextResult([items.GeneratedText("text", "length", [1, 2])]),
    "transcription": items.TranscriptionResult("said", [items.TranscriptionChunk("said", 0.5, None)], "en"),
    "object_detection": items.ObjectDetectionResult([items.DetectedObject("cat", 0.5, BOX)]),
    "segmentation": items.SegmentationResult([items.Segment("sky", PICTURE, None), items.Segment("sea", PICTURE, 0.5)]),
    "mask_generation": items.MaskGenerationResult([items.GeneratedMask(0.5, PICTURE, BOX)]),
    "depth": items.DepthResult(PICTURE, TENSOR),
    "keypoint_matching": items.KeypointMatchingResult([items.KeypointMatch((1.0, 2.0), (3.0, 4.0), 0.5)]),
    "image": items.ImageResult(PICTURE),
    "audio": items.AudioResult(b"1234", "pcm_s16le", 16_000, 2),
    "decision": items.DecisionResult(
        [items.DecisionAnswer("late", [items.LabelScore("true", 0.75, 0)], score=0.75, confidence=None)]
    ),
}


def test_the_tables_are_total() -> None:
    assert set(INPUT_READERS) == INPUT_KINDS == {kind.KIND for kind in get_args(items.TaskInput)}
    assert set(RESULT_WRITERS) == set(get_args(items.TaskResult)) - {items.ItemError}
    assert set(MADE) == set(RESULTS) == OUTCOMES - {"error"}
    for spec in TASKS.values():
        assert set(spec.input_kinds) <= INPUT_KINDS, spec.id
        assert set(spec.result_kinds) <= OUTCOMES, spec.id


@pytest.mark.parametrize("kind", sorted(MADE))
def test_results_arrive_at_the_client_as_they_were(kind: str) -> None:
    message = tasks_pb2.TaskResult.FromString(task_result(MADE[kind]).SerializeToString())
    assert message.WhichOneof("outcome") == kind
    found = result_from_proto(message, 3)
    assert (found.kind, found.index, found.error) == (kind, 3, None)
    assert type(found.value) is RESULTS[kind]
    # Every number and text of the domain's result is there (depth first, in any order).
    assert _leaves(found.value) >= _leaves(MADE[kind])


def _leaves(value: Any) -> set[Any]:
    if isinstance(value, items.Tensor):
        return {*value.shape, *struct.unpack(f"<{len(value.values) // 4}f", value.values)}
    if isinstance(value, msgspec.Struct):
        value = [getattr(value, name) for name in value.__struct_fields__]
    elif hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    if isinstance(value, list | tuple):
        return set().union(*map(_leaves, value))
    return {value}


@pytest.mark.parametrize("item", WHOLE, ids=lambda item: item.KIND)
def test_inputs_arrive_as_the_client_meant_them(item: items.TaskInput) -> None:
    message = tasks_pb2.TaskInput.FromString(_message_of(item).SerializeToString())
    assert task_input(message, "inputs[0]") == item
    check_input(TASKS["text-classification"], item)


def _message_of(item: items.TaskInput) -> tasks_pb2.TaskInput:
    """The message by the client's own spelling: the second source."""
    return input_message({item.KIND: _SPELLED[type(item)](item)}, "inputs[0]")


def _image(data: bytes) -> dict[str, bytes]:
    return {"data": data}


def _audio(sound: items.AudioInput) -> dict[str, Any]:
    word = "" if sound.encoding == "container" else sound.encoding
    return {"data": sound.data, "encoding": word, "sampling_rate_hz": sound.sampling_rate_hz}


_SPELLED: dict[type, Any] = {
    items.TextInput: lambda item: item.text,
    items.TextPairInput: lambda item: {"text": item.text, "text_pair": item.text_pair},
    items.WordsInput: lambda item: {"words": item.words},
    items.QuestionAnsweringInput: lambda item: {"question": item.question, "context": item.context},
    items.TableQuestionInput: lambda item: {
        "query": item.query,
        "table": {"columns": item.columns, "rows": [{"cells": row} for row in item.rows]},
    },
    items.ZeroShotInput: lambda item: {
        "text": item.text,
        "candidate_labels": item.candidate_labels,
        "hypothesis_template": item.hypothesis_template,
    },
    items.RankingInput: lambda item: {"query": item.query, "documents": item.documents},
    items.SimilarityInput: lambda item: {"source_sentence": item.source_sentence, "sentences": item.sentences},
    items.ImageInput: lambda item: item.data,
    items.ImagePairInput: lambda item: {"first": item.first, "second": item.second},
    items.ZeroShotImageInput: lambda item: {"image": item.image, "candidate_labels": item.candidate_labels},
    items.VisualQuestionInput: lambda item: {"image": item.image, "question": item.question},
    items.DocumentQuestionInput: lambda item: {
        "question": item.question,
        "words": [
            {"text": word.text, "box": dict(zip(("x_min", "y_min", "x_max", "y_max"), _edges(word.box), strict=True))}
            for word in item.words
        ],
    },
    items.AudioInput: _audio,
    items.ZeroShotAudioInput: lambda item: {"audio": _audio(item.audio), "candidate_labels": item.candidate_labels},
    items.VideoInput: lambda item: item.data,
    items.MultimodalInput: lambda item: {
        "parts": [
            {part.KIND: part.text if isinstance(part, items.TextInput) else _image(part.data)} for part in item.parts
        ]
    },
    items.DecisionInput: lambda item: {
        "state": item.state,
        "questions": [
            {"name": question.name, "instructions": question.instructions, "type": "yes_no"}
            for question in item.questions
        ],
        "assets": {name: _image(data) for name, data in item.assets.items()},
    },
}


def _edges(box: items.Box) -> tuple[float, ...]:
    return box.x_min, box.y_min, box.x_max, box.y_max


def test_what_only_protobuf_shows_is_refused() -> None:
    broken = [
        tasks_pb2.TaskInput(),
        tasks_pb2.TaskInput(audio=tasks_pb2.AudioInput(data=b"x", encoding=9)),  # type: ignore[arg-type]
        tasks_pb2.TaskInput(multimodal=tasks_pb2.MultimodalInput(parts=[tasks_pb2.MultimodalPart()])),
        tasks_pb2.TaskInput(decision=tasks_pb2.DecisionInput(questions=[tasks_pb2.DecisionQuestion(name="n")])),
    ]
    for message in broken:
        with pytest.raises(InvalidField, match=r"inputs\[7\]"):
            task_input(message, "inputs[7]")


def test_failures_carry_reason_and_field() -> None:
    found = result_from_proto(task_result(items.ItemError("PROMPT_TOO_LONG", "text: too long", "text")), 0)
    assert found.error is not None
    assert (found.error.reason, found.error.message) == ("PROMPT_TOO_LONG", "text: too long")
    found = result_from_proto(task_result(WorkerDied("gone")), 0)
    assert found.error is not None
    assert found.error.reason == "WORKER_DIED"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_their_place(number: float) -> None:
    parameters = struct_pb2.Struct()
    parameters.update({"top_k": [1, {"deep": number}]})
    with pytest.raises(InvalidField) as caught:
        parameters_of(parameters)
    assert [violation.field for violation in caught.value.violations] == ["parameters.top_k[1].deep"]
    state = tasks_pb2.TaskInput(decision=tasks_pb2.DecisionInput(state=struct_pb2.Value(number_value=number)))
    with pytest.raises(InvalidField, match=r"inputs\[0\]\.decision\.state"):
        task_input(state, "inputs[0]")


def test_values_arrive_as_json_has_them() -> None:
    given = {"whole": 3, "part": 0.5, "none": None, "yes": True, "text": "a", "list": [1, [], {"b": -2}]}
    parameters = struct_pb2.Struct()
    parameters.update(given)
    assert parameters_of(parameters) == given
    assert isinstance(parameters_of(parameters)["whole"], int)
