"""What tasks give: one small frozen dataclass for each kind of result, under the contract's own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slipstream.inference.v1 import tasks_pb2
from slipstream_client.errors import ServerError
from slipstream_client.plain import Failure, failure, plain
from slipstream_client.results import FinishReason, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScore:
    label: str
    score: float
    label_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Labels, best score first."""

    labels: tuple[LabelScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpan:
    """A labelled stretch of the text; characters are code points, the end is exclusive."""

    label: str
    score: float
    word: str
    start_char: int
    end_char: int
    token_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClassification:
    spans: tuple[TokenSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CharacterSpan:
    start_char: int
    end_char: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WordSpan:
    """Words of a page; the last one is inclusive."""

    start_word: int
    end_word: int
    page_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCell:
    row_index: int
    column_index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TableAnswer:
    aggregator: str
    cells: tuple[TableCell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer; at most one of the places is set."""

    text: str
    score: float
    character_span: CharacterSpan | None
    word_span: WordSpan | None
    table: TableAnswer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnswering:
    """Answers, best first."""

    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFill:
    score: float
    token_id: int
    token: str
    sequence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFills:
    fills: tuple[MaskFill, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FillMask:
    """The fills of each mask, in the order of the text."""

    masks: tuple[MaskFills, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Numbers in rows, the last dimension fastest."""

    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    vector: Tensor
    token_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedDocument:
    index: int
    score: float
    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Documents, best first."""

    documents: tuple[RankedDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """A cosine for each sentence, in their order."""

    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenText:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself."""
        return self.finish_reason != FinishReason.LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedTexts:
    """Texts, best first."""

    texts: tuple[WrittenText, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptionChunk:
    """``end_s`` None: the sound ends before the piece does."""

    text: str
    start_s: float
    end_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcription:
    text: str
    chunks: tuple[TranscriptionChunk, ...]
    language: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundingBox:
    """Pixels from the upper left corner."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedObject:
    label: str
    score: float
    box: BoundingBox


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectDetection:
    """Objects, best first."""

    objects: tuple[DetectedObject, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """A PNG file."""

    png: bytes
    width_pixels: int
    height_pixels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    label: str
    score: float | None
    mask: EncodedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedMask:
    score: float
    mask: EncodedImage
    box: BoundingBox


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskGeneration:
    """Masks, best first."""

    masks: tuple[GeneratedMask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """``predicted_depth`` is [height, width]; None where it was not asked for."""

    predicted_depth: Tensor | None
    depth: EncodedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeypointMatch:
    first: Point
    second: Point
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KeypointMatching:
    """Matches, best first."""

    matches: tuple[KeypointMatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audio:
    """Raw samples; ``encoding`` is "pcm_f32le" or "pcm_s16le"."""

    data: bytes
    encoding: str
    sampling_rate_hz: int
    channel_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionAnswer:
    name: str
    options: tuple[LabelScore, ...]
    choice: str
    score: float | None
    confidence: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    answers: tuple[DecisionAnswer, ...]


RESULTS: Mapping[str, Any] = {
    "classification": Classification,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "fill_mask": FillMask,
    "embedding": Embedding,
    "ranking": Ranking,
    "similarity": Similarity,
    "generated_text": GeneratedTexts,
    "transcription": Transcription,
    "object_detection": ObjectDetection,
    "segmentation": Segmentation,
    "mask_generation": MaskGeneration,
    "depth": Depth,
    "keypoint_matching": KeypointMatching,
    "image": EncodedImage,
    "audio": Audio,
    "decision": Decision,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What became of one input: ``value`` is the dataclass of its ``kind``, or ``error`` says why there is none."""

    kind: str
    value: Any = None
    error: Failure | None = None
    index: int = 0

    def unwrap(self) -> Any:
        """The value; raises ServerError where the input failed."""
        if self.error is not None:
            raise ServerError(f"input {self.index}: {self.error.message}", reason=self.error.reason)
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAnswer:
    """The results of one ``run``, in the order of the inputs."""

    results: tuple[TaskResult, ...]
    model: str
    adapter_version: str
    usage: Usage

    def values(self) -> list[Any]:
        """The value of every input; raises ServerError for the first that failed."""
        return [result.unwrap() for result in self.results]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskParameter:
    """A parameter of a task; ``type`` is bool, int, float, string, string_list, int_list or struct."""

    name: str
    description: str
    type: str
    default_value: Any
    min_value: float | None
    max_value: float | None
    allowed_values: tuple[str, ...]
    required: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task: what it takes, what it gives, and how it can be told to."""

    name: str
    description: str
    aliases: tuple[str, ...]
    input_kinds: tuple[str, ...]
    result_kinds: tuple[str, ...]
    parameters: tuple[TaskParameter, ...]
    default_model: str
    auto_classes: tuple[str, ...]
    families: tuple[str, ...]
    adapters_supported: bool
    missing_packages: tuple[str, ...]
    removed_in_transformers_version: str

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


def result_from_proto(proto: tasks_pb2.TaskResult, index: int) -> TaskResult:
    """The result for a TaskResult message; an outcome newer than this client has an empty kind."""
    kind = proto.WhichOneof("outcome") or ""
    if kind == "error":
        return TaskResult(kind=kind, error=failure(proto.error), index=index)
    value = plain(RESULTS[kind], getattr(proto, kind)) if kind in RESULTS else None
    return TaskResult(kind=kind if kind in RESULTS else "", value=value, index=index)
