"""Inputs of a task: whether the task takes them, whether they are whole, and how large they are.

A kind that the task does not take fails the whole call (``check_kinds``); contents that cannot be processed fail their
own input (``check_input``). Field names are the contract's, from the input down. Pure functions; any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.tasks.items import (
    AudioInput,
    DecisionInput,
    DocumentQuestionInput,
    ImageInput,
    ImagePairInput,
    MultimodalInput,
    QuestionAnsweringInput,
    RankingInput,
    SimilarityInput,
    TableQuestionInput,
    TaskInput,
    TextInput,
    TextPairInput,
    VideoInput,
    VisualQuestionInput,
    WordsInput,
    ZeroShotAudioInput,
    ZeroShotImageInput,
    ZeroShotInput,
)
from slipstream_server.tasks.specs import TaskSpec

MAX_INPUTS = 1024
MAX_TEXT_BYTES = 1024 * 1024
MAX_FILE_BYTES = 15 * 1024 * 1024
MAX_LABELS = 256
MAX_DOCUMENTS = 1024
MAX_WORDS = 65_536
MAX_CELLS = 65_536
MAX_PARTS = 256
MAX_QUESTIONS = 64
MAX_OPTIONS = 256
_RATES_HZ = (1, 384_000)


def check_kinds(spec: TaskSpec, inputs: Sequence[TaskInput]) -> None:
    """Raise InvalidField where there are none, too many, or one of a kind that the task does not take."""
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InvalidField.of("inputs", f"has {len(inputs)} entries; 1 to {MAX_INPUTS} are allowed")
    for place, item in enumerate(inputs):
        check_kind(spec, item, f"inputs[{place}]")


def check_kind(spec: TaskSpec, item: TaskInput, field: str) -> None:
    """Raise InvalidField for a kind that the task does not take."""
    if item.KIND not in spec.input_kinds:
        raise InvalidField.of(field, f"is of the kind {item.KIND}; {spec.id} takes {', '.join(spec.input_kinds)}")


def check_input(spec: TaskSpec, item: TaskInput) -> None:
    """Raise InvalidField or UnsupportedField for contents that cannot be processed."""
    _CHECKS[type(item)](item)
    if isinstance(item, ZeroShotImageInput) and spec.id == "zero-shot-object-detection" and item.hypothesis_template:
        raise UnsupportedField.of("zero_shot_image.hypothesis_template", f"is not used by {spec.id}; leave it unset")


def size_bytes(item: TaskInput) -> int:
    """About how many bytes an input holds."""
    return len(msgspec.msgpack.encode(item))


def check_text(text: str, field: str, *, required: bool = False) -> None:
    """Raise InvalidField for NUL, lone surrogates, more than 1 MiB of UTF-8, and for nothing where text is required."""
    if required and not text:
        raise InvalidField.of(field, "is empty; at least one character")
    if (place := text.find("\0")) >= 0:
        raise InvalidField.of(field, f"holds NUL at character {place}")
    try:
        size = len(text.encode()) if len(text) <= MAX_TEXT_BYTES else len(text)
    except UnicodeEncodeError as error:
        raise InvalidField.of(field, f"holds a lone surrogate at character {error.start}") from error
    if size > MAX_TEXT_BYTES:
        raise InvalidField.of(field, f"holds {size} bytes; at most {MAX_TEXT_BYTES}")


def _texts(texts: Sequence[str], field: str, most: int, *, distinct: bool = False) -> None:
    if not 1 <= len(texts) <= most:
        raise InvalidField.of(field, f"has {len(texts)} entries; 1 to {most} are allowed")
    for place, text in enumerate(texts):
        check_text(text, f"{field}[{place}]", required=distinct)
    if distinct and len(set(texts)) < len(texts):
        twice, _ = Counter(texts).most_common(1)[0]
        raise InvalidField.of(field, f"holds {twice[:80]!r} twice; each once")
    if sum(map(len, texts)) > MAX_TEXT_BYTES:
        raise InvalidField.of(field, f"holds {sum(map(len, texts))} characters together; at most {MAX_TEXT_BYTES}")


def _labels(kind: str, labels: Sequence[str], template: str | None) -> None:
    _texts(labels, f"{kind}.candidate_labels", MAX_LABELS, distinct=True)
    if template is not None:
        check_text(template, f"{kind}.hypothesis_template", required=True)
        if "{}" not in template:
            raise InvalidField.of(f"{kind}.hypothesis_template", "has no {} where the label goes")


def _file(data: bytes, field: str) -> None:
    if not data:
        raise InvalidField.of(field, "is empty")
    if len(data) > MAX_FILE_BYTES:
        raise InvalidField.of(field, f"holds {len(data)} bytes; at most {MAX_FILE_BYTES}")


def _text(item: TextInput) -> None:
    check_text(item.text, "text")


def _text_pair(item: TextPairInput) -> None:
    check_text(item.text, "text_pair.text")
    check_text(item.text_pair, "text_pair.text_pair")


def _words(item: WordsInput) -> None:
    _texts(item.words, "words.words", MAX_WORDS)
    check_text(item.delimiter, "words.delimiter")


def _question(item: QuestionAnsweringInput) -> None:
    check_text(item.question, "question_answering.question", required=True)
    check_text(item.context, "question_answering.context", required=True)


def _table(item: TableQuestionInput) -> None:
    check_text(item.query, "table_question.query", required=True)
    _texts(item.columns, "table_question.table.columns", MAX_CELLS, distinct=True)
    rows, columns = len(item.rows), len(item.columns)
    if not rows or rows * columns > MAX_CELLS:
        raise InvalidField.of("table_question.table.rows", f"has {rows} rows; at least 1, and {MAX_CELLS} cells in all")
    for place, row in enumerate(item.rows):
        if len(row) != columns:
            field = f"table_question.table.rows[{place}].cells"
            raise InvalidField.of(field, f"has {len(row)} cells; one for each of {columns} columns")
        for column, cell in enumerate(row):
            check_text(cell, f"table_question.table.rows[{place}].cells[{column}]")


def _zero_shot(item: ZeroShotInput) -> None:
    check_text(item.text, "zero_shot.text", required=True)
    _labels("zero_shot", item.candidate_labels, item.hypothesis_template)


def _ranking(item: RankingInput) -> None:
    check_text(item.query, "ranking.query", required=True)
    _texts(item.documents, "ranking.documents", MAX_DOCUMENTS)


def _similarity(item: SimilarityInput) -> None:
    check_text(item.source_sentence, "similarity.source_sentence", required=True)
    _texts(item.sentences, "similarity.sentences", MAX_DOCUMENTS)


def _image(item: ImageInput) -> None:
    _file(item.data, "image.data")


def _image_pair(item: ImagePairInput) -> None:
    _file(item.first, "image_pair.first.data")
    _file(item.second, "image_pair.second.data")


def _zero_shot_image(item: ZeroShotImageInput) -> None:
    _file(item.image, "zero_shot_image.image.data")
    _labels("zero_shot_image", item.candidate_labels, item.hypothesis_template)


def _visual_question(item: VisualQuestionInput) -> None:
    _file(item.image, "visual_question.image.data")
    check_text(item.question, "visual_question.question", required=True)


def _document_question(item: DocumentQuestionInput) -> None:
    check_text(item.question, "document_question.question", required=True)
    if item.image is not None:
        _file(item.image, "document_question.image.data")
    elif not item.words:
        raise InvalidField.of("document_question", "has neither image nor words")
    if len(item.words) > MAX_WORDS:
        raise InvalidField.of("document_question.words", f"has {len(item.words)} entries; at most {MAX_WORDS}")
    for place, word in enumerate(item.words):
        field = f"document_question.words[{place}]"
        check_text(word.text, f"{field}.text")
        box = word.box
        inside = all(0 <= edge <= 1000 for edge in (box.x_min, box.y_min, box.x_max, box.y_max))
        if not inside or box.x_max < box.x_min or box.y_max < box.y_min:
            raise InvalidField.of(f"{field}.box", "is no rectangle within 0 to 1000")


def _audio(item: AudioInput, field: str = "audio") -> None:
    _file(item.data, f"{field}.data")
    low, high = _RATES_HZ
    if item.encoding == "container":
        if item.sampling_rate_hz:
            raise InvalidField.of(f"{field}.sampling_rate_hz", "is for raw encodings; a container says it itself")
        return
    if not low <= item.sampling_rate_hz <= high:
        raise InvalidField.of(f"{field}.sampling_rate_hz", f"{item.sampling_rate_hz} is not from {low} to {high}")
    width = 4 if item.encoding == "pcm_f32le" else 2
    if len(item.data) % width:
        raise InvalidField.of(f"{field}.data", f"{len(item.data)} bytes are no whole number of {width}-byte samples")


def _zero_shot_audio(item: ZeroShotAudioInput) -> None:
    _audio(item.audio, "zero_shot_audio.audio")
    _labels("zero_shot_audio", item.candidate_labels, item.hypothesis_template)


def _video(item: VideoInput) -> None:
    _file(item.data, "video.data")


def _multimodal(item: MultimodalInput) -> None:
    if not 1 <= len(item.parts) <= MAX_PARTS:
        raise InvalidField.of("multimodal.parts", f"has {len(item.parts)} entries; 1 to {MAX_PARTS} are allowed")
    for place, part in enumerate(item.parts):
        field = f"multimodal.parts[{place}].{part.KIND}"
        match part:
            case TextInput():
                check_text(part.text, field)
            case AudioInput():
                _audio(part, field)
            case ImageInput() | VideoInput():
                _file(part.data, f"{field}.data")


def _decision(item: DecisionInput) -> None:
    if not 1 <= len(item.questions) <= MAX_QUESTIONS:
        found = len(item.questions)
        raise InvalidField.of("decision.questions", f"has {found} entries; 1 to {MAX_QUESTIONS} are allowed")
    names = [question.name for question in item.questions]
    for place, question in enumerate(item.questions):
        field = f"decision.questions[{place}]"
        check_text(question.name, f"{field}.name", required=True)
        check_text(question.instructions, f"{field}.instructions")
        if names.index(question.name) != place:
            raise InvalidField.of(f"{field}.name", f"{question.name[:80]!r} is used twice")
        least = 0 if question.type == "noul" else 2
        if not least <= len(question.options) <= MAX_OPTIONS:
            text = f"has {len(question.options)} entries; {least} to {MAX_OPTIONS} are allowed"
            raise InvalidField.of(f"{field}.options", text)
        for number, option in enumerate(question.options):
            check_text(option.name, f"{field}.options[{number}].name", required=question.type == "choice")
            check_text(option.description, f"{field}.options[{number}].description")
    _plain(item.state, "decision.state")
    for name, data in item.assets.items():
        check_text(name, "decision.assets", required=True)
        _file(data, f"decision.assets[{name[:40]!r}].data")


def _plain(value: Any, field: str) -> None:
    """Every text of plain JSON data."""
    match value:
        case str():
            check_text(value, field)
        case list():
            for place, item in enumerate(value):
                _plain(item, f"{field}[{place}]")
        case dict():
            for name, item in value.items():
                check_text(name, field)
                _plain(item, f"{field}.{name[:40]}")


_CHECKS: Mapping[type, Callable[[Any], None]] = {
    TextInput: _text,
    TextPairInput: _text_pair,
    WordsInput: _words,
    QuestionAnsweringInput: _question,
    TableQuestionInput: _table,
    ZeroShotInput: _zero_shot,
    RankingInput: _ranking,
    SimilarityInput: _similarity,
    ImageInput: _image,
    ImagePairInput: _image_pair,
    ZeroShotImageInput: _zero_shot_image,
    VisualQuestionInput: _visual_question,
    DocumentQuestionInput: _document_question,
    AudioInput: _audio,
    ZeroShotAudioInput: _zero_shot_audio,
    VideoInput: _video,
    MultimodalInput: _multimodal,
    DecisionInput: _decision,
}
