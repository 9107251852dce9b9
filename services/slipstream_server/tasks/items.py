"""What goes into a task and what comes out of it: plain structs, the same for every model, torch-free.

They travel between front and worker as msgpack, so that every field is plain data. Names and meanings are those of
TaskInput and TaskResult in the contract, which says units and ranges; ``KIND`` is the name of the contract's field.
Pictures, sounds and films are the caller's encoded bytes: only the worker decodes them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec


class _Item(msgspec.Struct, frozen=True, tag_field="kind"):
    """A struct that says its kind."""


# Inputs.


class TextInput(_Item, frozen=True, tag="text"):
    KIND: ClassVar[str] = "text"
    text: str


class TextPairInput(_Item, frozen=True, tag="text_pair"):
    KIND: ClassVar[str] = "text_pair"
    text: str
    text_pair: str


class WordsInput(_Item, frozen=True, tag="words"):
    KIND: ClassVar[str] = "words"
    words: tuple[str, ...]
    delimiter: str = " "


class QuestionAnsweringInput(_Item, frozen=True, tag="question_answering"):
    KIND: ClassVar[str] = "question_answering"
    question: str
    context: str


class TableQuestionInput(_Item, frozen=True, tag="table_question"):
    """``rows`` have one cell for each of ``columns``."""

    KIND: ClassVar[str] = "table_question"
    query: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class ZeroShotInput(_Item, frozen=True, tag="zero_shot"):
    """``hypothesis_template`` None: the task's default."""

    KIND: ClassVar[str] = "zero_shot"
    text: str
    candidate_labels: tuple[str, ...]
    hypothesis_template: str | None = None


class RankingInput(_Item, frozen=True, tag="ranking"):
    KIND: ClassVar[str] = "ranking"
    query: str
    documents: tuple[str, ...]


class SimilarityInput(_Item, frozen=True, tag="similarity"):
    KIND: ClassVar[str] = "similarity"
    source_sentence: str
    sentences: tuple[str, ...]


class ImageInput(_Item, frozen=True, tag="image"):
    KIND: ClassVar[str] = "image"
    data: bytes


class ImagePairInput(_Item, frozen=True, tag="image_pair"):
    KIND: ClassVar[str] = "image_pair"
    first: bytes
    second: bytes


class ZeroShotImageInput(_Item, frozen=True, tag="zero_shot_image"):
    KIND: ClassVar[str] = "zero_shot_image"
    image: bytes
    candidate_labels: tuple[str, ...]
    hypothesis_template: str | None = None


class VisualQuestionInput(_Item, frozen=True, tag="visual_question"):
    KIND: ClassVar[str] = "visual_question"
    image: bytes
    question: str


class Box(msgspec.Struct, frozen=True, array_like=True):
    """A rectangle: left, upper, right and lower edge."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


class PageWord(msgspec.Struct, frozen=True, array_like=True):
    """A word on a page; its box is scaled to 0..1000."""

    text: str
    box: Box


class DocumentQuestionInput(_Item, frozen=True, tag="document_question"):
    """``image`` None: only the words; no ``words``: a model that reads the picture alone."""

    KIND: ClassVar[str] = "document_question"
    question: str
    image: bytes | None = None
    words: tuple[PageWord, ...] = ()


AudioEncoding = Literal["container", "pcm_f32le", "pcm_s16le"]


class AudioInput(_Item, frozen=True, tag="audio"):
    """``sampling_rate_hz`` is set for the raw encodings and only there."""

    KIND: ClassVar[str] = "audio"
    data: bytes
    encoding: AudioEncoding = "container"
    sampling_rate_hz: int = 0


class ZeroShotAudioInput(_Item, frozen=True, tag="zero_shot_audio"):
    KIND: ClassVar[str] = "zero_shot_audio"
    audio: AudioInput
    candidate_labels: tuple[str, ...]
    hypothesis_template: str | None = None


class VideoInput(_Item, frozen=True, tag="video"):
    KIND: ClassVar[str] = "video"
    data: bytes


class MultimodalInput(_Item, frozen=True, tag="multimodal"):
    KIND: ClassVar[str] = "multimodal"
    parts: tuple[TextInput | ImageInput | AudioInput | VideoInput, ...]


class DecisionOption(msgspec.Struct, frozen=True, array_like=True):
    name: str
    description: str = ""


class DecisionQuestion(msgspec.Struct, frozen=True):
    name: str
    instructions: str
    type: Literal["choice", "score", "noul"]
    options: tuple[DecisionOption, ...] = ()


class DecisionInput(_Item, frozen=True, tag="decision"):
    """``state`` is plain JSON data; ``assets`` are pictures by placeholder."""

    KIND: ClassVar[str] = "decision"
    state: Any
    questions: tuple[DecisionQuestion, ...]
    assets: dict[str, bytes] = {}


TaskInput = (
    TextInput
    | TextPairInput
    | WordsInput
    | QuestionAnsweringInput
    | TableQuestionInput
    | ZeroShotInput
    | RankingInput
    | SimilarityInput
    | ImageInput
    | ImagePairInput
    | ZeroShotImageInput
    | VisualQuestionInput
    | DocumentQuestionInput
    | AudioInput
    | ZeroShotAudioInput
    | VideoInput
    | MultimodalInput
    | DecisionInput
)


# Results.


class ItemError(_Item, frozen=True, tag="error"):
    """Why one input has no result. ``reason`` is an ErrorReason name; ``field`` the input's field, where one is at
    fault.
    """

    reason: str
    message: str
    field: str = ""


class LabelScore(msgspec.Struct, frozen=True, array_like=True):
    label: str
    score: float
    label_id: int


class ClassificationResult(_Item, frozen=True, tag="classification"):
    KIND: ClassVar[str] = "classification"
    labels: list[LabelScore]


class TokenSpan(msgspec.Struct, frozen=True, array_like=True):
    label: str
    score: float
    word: str
    start_char: int
    end_char: int
    token_index: int


class TokenClassificationResult(_Item, frozen=True, tag="token_classification"):
    KIND: ClassVar[str] = "token_classification"
    spans: list[TokenSpan]


class TableCell(msgspec.Struct, frozen=True, array_like=True):
    row_index: int
    column_index: int
    text: str


class TableAnswer(msgspec.Struct, frozen=True):
    """``aggregator`` is empty for models without one."""

    aggregator: str
    cells: list[TableCell]


class CharacterSpan(msgspec.Struct, frozen=True, array_like=True):
    """Code points; the end is exclusive."""

    start_char: int
    end_char: int


class WordSpan(msgspec.Struct, frozen=True, array_like=True):
    """Words; the last one is inclusive."""

    start_word: int
    end_word: int
    page_index: int = 0


class Answer(msgspec.Struct, frozen=True):
    """At most one of the places is set."""

    text: str
    score: float = 0.0
    character_span: CharacterSpan | None = None
    word_span: WordSpan | None = None
    table: TableAnswer | None = None


class QuestionAnsweringResult(_Item, frozen=True, tag="question_answering"):
    KIND: ClassVar[str] = "question_answering"
    answers: list[Answer]


class MaskFill(msgspec.Struct, frozen=True, array_like=True):
    score: float
    token_id: int
    token: str
    sequence: str


class FillMaskResult(_Item, frozen=True, tag="fill_mask"):
    """The fills of each mask, in the order of the text."""

    KIND: ClassVar[str] = "fill_mask"
    masks: list[list[MaskFill]]


class Tensor(msgspec.Struct, frozen=True):
    """``values`` are little-endian float32, last dimension fastest."""

    shape: tuple[int, ...]
    values: bytes


class EmbeddingResult(_Item, frozen=True, tag="embedding"):
    KIND: ClassVar[str] = "embedding"
    vector: Tensor
    num_tokens: int


class RankedDocument(msgspec.Struct, frozen=True, array_like=True):
    index: int
    score: float
    document: str = ""


class RankingResult(_Item, frozen=True, tag="ranking"):
    KIND: ClassVar[str] = "ranking"
    documents: list[RankedDocument]


class SimilarityResult(_Item, frozen=True, tag="similarity"):
    KIND: ClassVar[str] = "similarity"
    scores: list[float]


class GeneratedText(msgspec.Struct, frozen=True):
    text: str
    finish_reason: Literal["eos_token", "stop_token", "stop_string", "length"]
    token_ids: list[int] = []


class GeneratedTextResult(_Item, frozen=True, tag="generated_text"):
    KIND: ClassVar[str] = "generated_text"
    texts: list[GeneratedText]


class TranscriptionChunk(msgspec.Struct, frozen=True, array_like=True):
    """``end_s`` None: the sound ends before the piece does."""

    text: str
    start_s: float
    end_s: float | None


class TranscriptionResult(_Item, frozen=True, tag="transcription"):
    KIND: ClassVar[str] = "transcription"
    text: str
    chunks: list[TranscriptionChunk] = []
    language: str = ""


class DetectedObject(msgspec.Struct, frozen=True):
    label: str
    score: float
    box: Box


class ObjectDetectionResult(_Item, frozen=True, tag="object_detection"):
    KIND: ClassVar[str] = "object_detection"
    objects: list[DetectedObject]


class EncodedImage(msgspec.Struct, frozen=True):
    """A PNG file."""

    png: bytes
    width_pixels: int
    height_pixels: int


class Segment(msgspec.Struct, frozen=True):
    label: str
    mask: EncodedImage
    score: float | None = None


class SegmentationResult(_Item, frozen=True, tag="segmentation"):
    KIND: ClassVar[str] = "segmentation"
    segments: list[Segment]


class GeneratedMask(msgspec.Struct, frozen=True):
    score: float
    mask: EncodedImage
    box: Box


class MaskGenerationResult(_Item, frozen=True, tag="mask_generation"):
    KIND: ClassVar[str] = "mask_generation"
    masks: list[GeneratedMask]


class DepthResult(_Item, frozen=True, tag="depth"):
    """``predicted_depth`` None where the caller does not want the numbers."""

    KIND: ClassVar[str] = "depth"
    depth: EncodedImage
    predicted_depth: Tensor | None = None


class KeypointMatch(msgspec.Struct, frozen=True, array_like=True):
    """Both points as (x, y) pixels."""

    first: tuple[float, float]
    second: tuple[float, float]
    score: float


class KeypointMatchingResult(_Item, frozen=True, tag="keypoint_matching"):
    KIND: ClassVar[str] = "keypoint_matching"
    matches: list[KeypointMatch]


class ImageResult(_Item, frozen=True, tag="image"):
    KIND: ClassVar[str] = "image"
    image: EncodedImage


class AudioResult(_Item, frozen=True, tag="audio"):
    KIND: ClassVar[str] = "audio"
    data: bytes
    encoding: Literal["pcm_f32le", "pcm_s16le"]
    sampling_rate_hz: int
    num_channels: int = 1


class DecisionAnswer(msgspec.Struct, frozen=True):
    name: str
    options: list[LabelScore]
    choice: str = ""
    score: float | None = None
    confidence: float | None = None


class DecisionResult(_Item, frozen=True, tag="decision"):
    KIND: ClassVar[str] = "decision"
    answers: list[DecisionAnswer]


TaskResult = (
    ItemError
    | ClassificationResult
    | TokenClassificationResult
    | QuestionAnsweringResult
    | FillMaskResult
    | EmbeddingResult
    | RankingResult
    | SimilarityResult
    | GeneratedTextResult
    | TranscriptionResult
    | ObjectDetectionResult
    | SegmentationResult
    | MaskGenerationResult
    | DepthResult
    | KeypointMatchingResult
    | ImageResult
    | AudioResult
    | DecisionResult
)


class TaskRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call's work for one worker, complete: parameters are validated and every default is filled in.

    ``deadline_monotonic_s`` is CLOCK_MONOTONIC, which processes of one machine share. Ids are the front's. Requests
    that are parts of one call have its ``call``: together they get the share of one. None: a call of its own.
    """

    id: int
    task: str
    inputs: tuple[TaskInput, ...]
    call: int | None = None
    parameters: dict[str, Any] = {}
    priority: int = 1
    deadline_monotonic_s: float | None = None
