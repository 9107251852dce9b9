"""Inputs of ``slipstream run``: words of the command line and files, as the kind that the task takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

MAX_FILE_BYTES = 15 * 1024 * 1024
MAX_LINE_CHARACTERS = 20 * 1024 * 1024
_ZERO_SHOT = {"zero_shot": "text", "zero_shot_image": "image", "zero_shot_audio": "audio"}
_FILES = ("image", "audio", "video")
_LINES = "--file inputs.jsonl, an input in each line"
_BESIDE_TEXT = {
    "question_answering": "--context, the text that holds the answer",
    "zero_shot": "--label, once for each",
    "ranking": "--document, once for each",
    "similarity": "--document, once for each",
    **dict.fromkeys(("image", "audio", "video", "visual_question"), "--file, a picture, sound or film"),
    "document_question": f"--file, a picture of the page, or where the model needs its words and their boxes, {_LINES}",
    "zero_shot_image": "--file, a picture, and --label, once for each",
    "zero_shot_audio": "--file, a sound, and --label, once for each",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What the command line says."""

    texts: Sequence[str] = ()
    question: str | None = None
    context: str | None = None
    labels: Sequence[str] = ()
    documents: Sequence[str] = ()
    file: Path | None = None


def is_lines(path: Path | None) -> bool:
    """Whether a file holds inputs line by line."""
    return path is not None and path.suffix.lower() in (".jsonl", ".ndjson", ".txt")


def lines_of(path: Path) -> Iterator[Any]:
    """The inputs of a file: each line of a .txt one text, else JSON, a text or an object with one kind; pictures and
    sounds in base64.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if len(line) > MAX_LINE_CHARACTERS:
                raise typer.BadParameter(f"line {number} is longer than {MAX_LINE_CHARACTERS} characters")
            if not line.strip():
                continue
            if path.suffix.lower() == ".txt":
                yield line.rstrip("\n")
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise typer.BadParameter(f"line {number} is no JSON: {error}", param_hint="--file") from error


def inputs_of(words: Words, kinds: Sequence[str]) -> list[Any]:
    """The inputs of one call, for a task that takes ``kinds``; wrong usage where the words do not make one."""
    data = _read(words.file) if words.file is not None else None
    if data is not None:
        return [_with_file(words, kinds, data)]
    if words.question is not None or words.context is not None:
        _need("question_answering" in kinds, "this task takes no --context", "--context")
        question = words.question if words.question is not None else _one_text(words, "a question")
        return [{"question_answering": {"question": question, "context": words.context or ""}}]
    if words.labels:
        _need("zero_shot" in kinds, "this task takes no --label", "--label")
        return [{"zero_shot": {"text": text, "candidate_labels": list(words.labels)}} for text in words.texts]
    if words.documents:
        return [_compared(words, kinds)]
    _need(bool(words.texts), "give a text, or --file", "TEXT")
    missing = next((_BESIDE_TEXT[kind] for kind in kinds if kind in _BESIDE_TEXT), _LINES)
    _need("text" in kinds, f"a text alone is not enough for this task; give {missing}", "TEXT")
    return list(words.texts)


def _with_file(words: Words, kinds: Sequence[str], data: bytes) -> Mapping[str, Any]:
    for zero_shot, part in _ZERO_SHOT.items():
        if zero_shot in kinds and words.labels:
            return {zero_shot: {part: {"data": data}, "candidate_labels": list(words.labels)}}
    asked = words.question if words.question is not None else words.texts[0] if words.texts else None
    for about_page in ("visual_question", "document_question"):
        if about_page in kinds:
            _need(asked is not None, "give a question", "TEXT")
            return {about_page: {"image": {"data": data}, "question": asked}}
    if "multimodal" in kinds and asked is not None:
        return {"multimodal": {"parts": [{"image": {"data": data}}, {"text": asked}]}}
    kind = next((kind for kind in _FILES if kind in kinds), None)
    _need(kind is not None, f"this task takes {', '.join(kinds)}, not a file of this kind", "--file")
    return {str(kind): {"data": data}}


def _compared(words: Words, kinds: Sequence[str]) -> Mapping[str, Any]:
    text = _one_text(words, "a query")
    if "ranking" in kinds:
        return {"ranking": {"query": text, "documents": list(words.documents)}}
    _need("similarity" in kinds, "this task takes no --document", "--document")
    return {"similarity": {"source_sentence": text, "sentences": list(words.documents)}}


def _one_text(words: Words, what: str) -> str:
    _need(len(words.texts) == 1, f"give {what}", "TEXT")
    return words.texts[0]


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise typer.BadParameter(f"is larger than {MAX_FILE_BYTES} bytes", param_hint="--file")
    return path.read_bytes()


def _need(condition: bool, message: str, hint: str) -> None:
    if not condition:
        raise typer.BadParameter(message, param_hint=hint)
