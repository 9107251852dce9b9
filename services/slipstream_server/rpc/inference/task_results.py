"""Results of tasks, from the domain to protobuf. Pure functions; the table is total over the contract's oneof."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from slipstream.inference.v1 import tasks_pb2
from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.task_runs import TaskOutcome
from slipstream_server.inference.worker_errors import error_of
from slipstream_server.rpc.inference.convert import finish_reason
from slipstream_server.rpc.status import status_of
from slipstream_server.tasks import items

_RAW_ENCODINGS = {
    "pcm_f32le": tasks_pb2.AUDIO_ENCODING_PCM_F32LE,
    "pcm_s16le": tasks_pb2.AUDIO_ENCODING_PCM_S16LE,
}


def task_result(outcome: TaskOutcome) -> tasks_pb2.TaskResult:
    """What became of one input, a failure as a status with details."""
    if isinstance(outcome, SlipstreamError):
        return tasks_pb2.TaskResult(error=status_of(outcome))
    if isinstance(outcome, items.ItemError):
        return tasks_pb2.TaskResult(error=status_of(error_of(outcome.reason, outcome.message, outcome.field)))
    kind, message = RESULT_WRITERS[type(outcome)](outcome)
    return tasks_pb2.TaskResult(**{kind: message})


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
