"""Tasks between protobuf and the domain: inputs in, results out, and what a task is. Pure functions.

Both tables are total over the contract's oneofs; what protobuf alone can tell (an unset oneof, an unset enum) is judged
here, contents by ``tasks/inputs.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf import json_format, struct_pb2
from google.rpc import status_pb2

from slipstream.inference.v1 import architecture_pb2, tasks_pb2
from slipstream_server.errors import FieldViolation, InvalidField, SlipstreamError
from slipstream_server.inference.task_runs import TaskOutcome
from slipstream_server.inference.worker_errors import error_of
from slipstream_server.rpc.inference.convert import finish_reason
from slipstream_server.rpc.inference.structs import struct_to_dict, value_to_plain
from slipstream_server.rpc.status import status_of
from slipstream_server.tasks import items
from slipstream_server.tasks.parameters import described_parameters
from slipstream_server.tasks.specs import Parameter, TaskSpec

_ENCODINGS: Mapping[int, items.AudioEncoding] = {
    tasks_pb2.AUDIO_ENCODING_UNSPECIFIED: "container",
    tasks_pb2.AUDIO_ENCODING_PCM_F32LE: "pcm_f32le",
    tasks_pb2.AUDIO_ENCODING_PCM_S16LE: "pcm_s16le",
}
_RAW_ENCODINGS = {
    "pcm_f32le": tasks_pb2.AUDIO_ENCODING_PCM_F32LE,
    "pcm_s16le": tasks_pb2.AUDIO_ENCODING_PCM_S16LE,
}
_QUESTION_TYPES: Mapping[int, Any] = {
    tasks_pb2.DECISION_QUESTION_TYPE_CHOICE: "choice",
    tasks_pb2.DECISION_QUESTION_TYPE_SCORE: "score",
    tasks_pb2.DECISION_QUESTION_TYPE_YES_NO: "noul",
}


# Inputs.


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


# Results.


def task_result(outcome: TaskOutcome) -> tasks_pb2.TaskResult:
    """What became of one input, a failure as a status with details."""
    if isinstance(outcome, SlipstreamError):
        return tasks_pb2.TaskResult(error=status_of(outcome))
    if isinstance(outcome, items.ItemError):
        return tasks_pb2.TaskResult(error=_item_status(outcome))
    kind, message = RESULT_WRITERS[type(outcome)](outcome)
    return tasks_pb2.TaskResult(**{kind: message})


def _item_status(error: items.ItemError) -> status_pb2.Status:
    description = error.message.removeprefix(f"{error.field}: ")
    violations = [FieldViolation(error.field, description)] if error.field else []
    return status_of(type(error_of(error.reason, ""))(error.message, violations=violations))


def _labels(labels: list[items.LabelScore]) -> list[tasks_pb2.LabelScore]:
    return [tasks_pb2.LabelScore(label=label.label, score=label.score, label_id=label.label_id) for label in labels]


def _classification(result: items.ClassificationResult) -> tuple[str, Any]:
    return "classification", tasks_pb2.ClassificationResult(labels=_labels(result.labels))


def _token_classification(result: items.TokenClassificationResult) -> tuple[str, Any]:
    spans = [
        tasks_pb2.TokenSpan(
            label=span.label,
            score=span.score,
            word=span.word,
            start_char=span.start_char,
            end_char=span.end_char,
            token_index=span.token_index,
        )
        for span in result.spans
    ]
    return "token_classification", tasks_pb2.TokenClassificationResult(spans=spans)


def _answer(answer: items.Answer) -> tasks_pb2.Answer:
    message = tasks_pb2.Answer(text=answer.text, score=answer.score)
    if (span := answer.character_span) is not None:
        message.character_span.CopyFrom(tasks_pb2.CharacterSpan(start_char=span.start_char, end_char=span.end_char))
    elif (words := answer.word_span) is not None:
        message.word_span.CopyFrom(
            tasks_pb2.WordSpan(start_word=words.start_word, end_word=words.end_word, page_index=words.page_index)
        )
    elif (table := answer.table) is not None:
        cells = [
            tasks_pb2.TableCell(row_index=cell.row_index, column_index=cell.column_index, text=cell.text)
            for cell in table.cells
        ]
        message.table.CopyFrom(tasks_pb2.TableAnswer(aggregator=table.aggregator, cells=cells))
    return message


def _answers(result: items.QuestionAnsweringResult) -> tuple[str, Any]:
    return "question_answering", tasks_pb2.QuestionAnsweringResult(answers=map(_answer, result.answers))


def _fill_mask(result: items.FillMaskResult) -> tuple[str, Any]:
    masks = [
        tasks_pb2.MaskFills(
            fills=[
                tasks_pb2.MaskFill(score=fill.score, token_id=fill.token_id, token=fill.token, sequence=fill.sequence)
                for fill in mask
            ]
        )
        for mask in result.masks
    ]
    return "fill_mask", tasks_pb2.FillMaskResult(masks=masks)


def _tensor(tensor: items.Tensor) -> tasks_pb2.Tensor:
    values = struct.unpack(f"<{len(tensor.values) // 4}f", tensor.values)
    return tasks_pb2.Tensor(shape=tensor.shape, values=values)


def _embedding(result: items.EmbeddingResult) -> tuple[str, Any]:
    return "embedding", tasks_pb2.EmbeddingResult(vector=_tensor(result.vector), token_count=result.num_tokens)


def _ranked(result: items.RankingResult) -> tuple[str, Any]:
    documents = [
        tasks_pb2.RankedDocument(index=found.index, score=found.score, document=found.document)
        for found in result.documents
    ]
    return "ranking", tasks_pb2.RankingResult(documents=documents)


def _scores(result: items.SimilarityResult) -> tuple[str, Any]:
    return "similarity", tasks_pb2.SimilarityResult(scores=result.scores)


def _generated(result: items.GeneratedTextResult) -> tuple[str, Any]:
    texts = [
        tasks_pb2.GeneratedText(
            text=text.text, token_ids=text.token_ids, finish_reason=finish_reason(text.finish_reason)
        )
        for text in result.texts
    ]
    return "generated_text", tasks_pb2.GeneratedTextResult(texts=texts)


def _transcription(result: items.TranscriptionResult) -> tuple[str, Any]:
    chunks = [
        tasks_pb2.TranscriptionChunk(text=chunk.text, start_s=chunk.start_s, end_s=chunk.end_s)
        for chunk in result.chunks
    ]
    return "transcription", tasks_pb2.TranscriptionResult(text=result.text, chunks=chunks, language=result.language)


def _box_message(box: items.Box) -> tasks_pb2.BoundingBox:
    return tasks_pb2.BoundingBox(x_min=box.x_min, y_min=box.y_min, x_max=box.x_max, y_max=box.y_max)


def _objects(result: items.ObjectDetectionResult) -> tuple[str, Any]:
    objects = [
        tasks_pb2.DetectedObject(label=found.label, score=found.score, box=_box_message(found.box))
        for found in result.objects
    ]
    return "object_detection", tasks_pb2.ObjectDetectionResult(objects=objects)


def _png(image: items.EncodedImage) -> tasks_pb2.EncodedImage:
    return tasks_pb2.EncodedImage(png=image.png, width_pixels=image.width_pixels, height_pixels=image.height_pixels)


def _segments(result: items.SegmentationResult) -> tuple[str, Any]:
    segments = [
        tasks_pb2.Segment(label=found.label, score=found.score, mask=_png(found.mask)) for found in result.segments
    ]
    return "segmentation", tasks_pb2.SegmentationResult(segments=segments)


def _masks(result: items.MaskGenerationResult) -> tuple[str, Any]:
    masks = [
        tasks_pb2.GeneratedMask(score=mask.score, mask=_png(mask.mask), box=_box_message(mask.box))
        for mask in result.masks
    ]
    return "mask_generation", tasks_pb2.MaskGenerationResult(masks=masks)


def _depth(result: items.DepthResult) -> tuple[str, Any]:
    numbers = None if result.predicted_depth is None else _tensor(result.predicted_depth)
    return "depth", tasks_pb2.DepthResult(predicted_depth=numbers, depth=_png(result.depth))


def _matches(result: items.KeypointMatchingResult) -> tuple[str, Any]:
    matches = [
        tasks_pb2.KeypointMatch(
            first=tasks_pb2.Point(x=match.first[0], y=match.first[1]),
            second=tasks_pb2.Point(x=match.second[0], y=match.second[1]),
            score=match.score,
        )
        for match in result.matches
    ]
    return "keypoint_matching", tasks_pb2.KeypointMatchingResult(matches=matches)


def _picture(result: items.ImageResult) -> tuple[str, Any]:
    return "image", _png(result.image)


def _sound(result: items.AudioResult) -> tuple[str, Any]:
    return "audio", tasks_pb2.AudioResult(
        data=result.data,
        encoding=_RAW_ENCODINGS[result.encoding],
        sampling_rate_hz=result.sampling_rate_hz,
        channel_count=result.num_channels,
    )


def _decisions(result: items.DecisionResult) -> tuple[str, Any]:
    answers = [
        tasks_pb2.DecisionAnswer(
            name=answer.name,
            options=_labels(answer.options),
            choice=answer.choice,
            score=answer.score,
            confidence=answer.confidence,
        )
        for answer in result.answers
    ]
    return "decision", tasks_pb2.DecisionResult(answers=answers)


RESULT_WRITERS: Mapping[type, Callable[[Any], tuple[str, Any]]] = {
    items.ClassificationResult: _classification,
    items.TokenClassificationResult: _token_classification,
    items.QuestionAnsweringResult: _answers,
    items.FillMaskResult: _fill_mask,
    items.EmbeddingResult: _embedding,
    items.RankingResult: _ranked,
    items.SimilarityResult: _scores,
    items.GeneratedTextResult: _generated,
    items.TranscriptionResult: _transcription,
    items.ObjectDetectionResult: _objects,
    items.SegmentationResult: _segments,
    items.MaskGenerationResult: _masks,
    items.DepthResult: _depth,
    items.KeypointMatchingResult: _matches,
    items.ImageResult: _picture,
    items.AudioResult: _sound,
    items.DecisionResult: _decisions,
}


# What a task is.


def parameters_of(struct_message: struct_pb2.Struct) -> dict[str, Any]:
    """``parameters`` as plain data."""
    return struct_to_dict(struct_message, "parameters")


def task_message(spec: TaskSpec, *, default_model: str, missing_packages: tuple[str, ...]) -> tasks_pb2.Task:
    """A task as DescribeTask shows it. ``default_model`` is a resource name, or empty."""
    return tasks_pb2.Task(
        name=f"tasks/{spec.id}",
        description=spec.description,
        aliases=spec.aliases,
        input_kinds=spec.input_kinds,
        result_kinds=spec.result_kinds,
        parameters=[_parameter(parameter) for parameter in described_parameters(spec)],
        default_model=default_model,
        auto_classes=spec.auto_classes,
        families=[
            architecture_pb2.ArchitectureFamily.Value(f"ARCHITECTURE_FAMILY_{family.upper()}")
            for family in spec.families
        ],
        adapters_supported=spec.adapters_supported,
        missing_packages=missing_packages,
        removed_in_transformers_version=spec.removed_in_transformers,
    )


def _parameter(parameter: Parameter) -> tasks_pb2.TaskParameter:
    message = tasks_pb2.TaskParameter(
        name=parameter.name,
        description=parameter.description,
        type=tasks_pb2.TaskParameterType.Value(f"TASK_PARAMETER_TYPE_{parameter.type.value.upper()}"),
        min_value=parameter.min_value,
        max_value=parameter.max_value,
        allowed_values=parameter.allowed_values,
        required=parameter.required,
    )
    if parameter.default is not None:
        json_format.ParseDict(parameter.default, message.default_value)
    return message
