"""Inputs and parameters of tasks, from protobuf to the domain. Pure functions.

The table is total over the contract's oneof; what protobuf alone can tell (an unset oneof, an unset enum) is judged
here, contents by ``tasks/inputs.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import struct_pb2

from slipstream.inference.v1 import tasks_pb2
from slipstream_server.errors import InvalidField
from slipstream_server.rpc.inference.structs import struct_to_dict, value_to_plain
from slipstream_server.tasks import items

_ENCODINGS: Mapping[int, items.AudioEncoding] = {
    tasks_pb2.AUDIO_ENCODING_UNSPECIFIED: "container",
    tasks_pb2.AUDIO_ENCODING_PCM_F32LE: "pcm_f32le",
    tasks_pb2.AUDIO_ENCODING_PCM_S16LE: "pcm_s16le",
}
_QUESTION_TYPES: Mapping[int, Any] = {
    tasks_pb2.DECISION_QUESTION_TYPE_CHOICE: "choice",
    tasks_pb2.DECISION_QUESTION_TYPE_SCORE: "score",
    tasks_pb2.DECISION_QUESTION_TYPE_YES_NO: "noul",
}


def parameters_of(struct_message: struct_pb2.Struct) -> dict[str, Any]:
    """``parameters`` as plain data."""
    return struct_to_dict(struct_message, "parameters")


def task_input(message: tasks_pb2.TaskInput, field: str) -> items.TaskInput:
    """An input as the domain has it. InvalidField where nothing is set, or an enum that must be."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidField.of(field, "is empty; set one of its kinds")
    return INPUT_READERS[kind](getattr(message, kind), f"{field}.{kind}")


def _text(text: str, field: str) -> items.TextInput:
    return items.TextInput(text)


def _text_pair(pair: tasks_pb2.TextPairInput, field: str) -> items.TextPairInput:
    return items.TextPairInput(pair.text, pair.text_pair)


def _words(words: tasks_pb2.WordsInput, field: str) -> items.WordsInput:
    return items.WordsInput(tuple(words.words), words.delimiter if words.HasField("delimiter") else " ")


def _question_answering(asked: tasks_pb2.QuestionAnsweringInput, field: str) -> items.QuestionAnsweringInput:
    return items.QuestionAnsweringInput(asked.question, asked.context)


def _table_question(asked: tasks_pb2.TableQuestionInput, field: str) -> items.TableQuestionInput:
    rows = tuple(tuple(row.cells) for row in asked.table.rows)
    return items.TableQuestionInput(asked.query, tuple(asked.table.columns), rows)


def _template(message: Any) -> str | None:
    return message.hypothesis_template if message.HasField("hypothesis_template") else None


def _zero_shot(asked: tasks_pb2.ZeroShotInput, field: str) -> items.ZeroShotInput:
    return items.ZeroShotInput(asked.text, tuple(asked.candidate_labels), _template(asked))


def _ranking(asked: tasks_pb2.RankingInput, field: str) -> items.RankingInput:
    return items.RankingInput(asked.query, tuple(asked.documents))


def _similarity(asked: tasks_pb2.SimilarityInput, field: str) -> items.SimilarityInput:
    return items.SimilarityInput(asked.source_sentence, tuple(asked.sentences))


def _image(image: tasks_pb2.ImageInput, field: str) -> items.ImageInput:
    return items.ImageInput(image.data)


def _image_pair(pair: tasks_pb2.ImagePairInput, field: str) -> items.ImagePairInput:
    return items.ImagePairInput(pair.first.data, pair.second.data)


def _zero_shot_image(asked: tasks_pb2.ZeroShotImageInput, field: str) -> items.ZeroShotImageInput:
    return items.ZeroShotImageInput(asked.image.data, tuple(asked.candidate_labels), _template(asked))


def _visual_question(asked: tasks_pb2.VisualQuestionInput, field: str) -> items.VisualQuestionInput:
    return items.VisualQuestionInput(asked.image.data, asked.question)


def _document_question(asked: tasks_pb2.DocumentQuestionInput, field: str) -> items.DocumentQuestionInput:
    words = tuple(items.PageWord(word.text, _box(word.box)) for word in asked.words)
    return items.DocumentQuestionInput(asked.question, asked.image.data if asked.HasField("image") else None, words)


def _box(box: tasks_pb2.BoundingBox) -> items.Box:
    return items.Box(box.x_min, box.y_min, box.x_max, box.y_max)


def _audio(audio: tasks_pb2.AudioInput, field: str) -> items.AudioInput:
    if audio.encoding not in _ENCODINGS:
        raise InvalidField.of(f"{field}.encoding", f"{audio.encoding} is no value of AudioEncoding")
    return items.AudioInput(audio.data, _ENCODINGS[audio.encoding], audio.sampling_rate_hz)


def _zero_shot_audio(asked: tasks_pb2.ZeroShotAudioInput, field: str) -> items.ZeroShotAudioInput:
    audio = _audio(asked.audio, f"{field}.audio")
    return items.ZeroShotAudioInput(audio, tuple(asked.candidate_labels), _template(asked))


def _video(video: tasks_pb2.VideoInput, field: str) -> items.VideoInput:
    return items.VideoInput(video.data)


_PART_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "text": _text,
    "image": _image,
    "audio": _audio,
    "video": _video,
}


def _multimodal(asked: tasks_pb2.MultimodalInput, field: str) -> items.MultimodalInput:
    parts = []
    for place, part in enumerate(asked.parts):
        kind = part.WhichOneof("kind")
        if kind is None:
            raise InvalidField.of(f"{field}.parts[{place}]", "is empty; set text, image, audio or video")
        parts.append(_PART_READERS[kind](getattr(part, kind), f"{field}.parts[{place}].{kind}"))
    return items.MultimodalInput(tuple(parts))


def _decision(asked: tasks_pb2.DecisionInput, field: str) -> items.DecisionInput:
    questions = tuple(_question(q, f"{field}.questions[{place}]") for place, q in enumerate(asked.questions))
    state = value_to_plain(asked.state, f"{field}.state")
    return items.DecisionInput(state, questions, {name: image.data for name, image in asked.assets.items()})


def _question(question: tasks_pb2.DecisionQuestion, field: str) -> items.DecisionQuestion:
    kind = _QUESTION_TYPES.get(question.type)
    if kind is None:
        raise InvalidField.of(f"{field}.type", f"{question.type} is not one of choice (1), score (2), yes-or-no (3)")
    options = tuple(items.DecisionOption(option.name, option.description) for option in question.options)
    return items.DecisionQuestion(question.name, question.instructions, kind, options)


INPUT_READERS: Mapping[str, Callable[[Any, str], items.TaskInput]] = {
    "text": _text,
    "text_pair": _text_pair,
    "words": _words,
    "question_answering": _question_answering,
    "table_question": _table_question,
    "zero_shot": _zero_shot,
    "ranking": _ranking,
    "similarity": _similarity,
    "image": _image,
    "image_pair": _image_pair,
    "zero_shot_image": _zero_shot_image,
    "visual_question": _visual_question,
    "document_question": _document_question,
    "audio": _audio,
    "zero_shot_audio": _zero_shot_audio,
    "video": _video,
    "multimodal": _multimodal,
    "decision": _decision,
}
