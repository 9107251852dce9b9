"""Results of tasks for people: bars for labels, colours in the text, files for pictures and sounds."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.text import Text

from slipstream_client import task_results as results
from slipstream_client.cli import terminal

_BAR_WIDTH = 24
_FIRST_NUMBERS = 6
_STYLES = ("black on cyan", "black on green", "black on yellow", "black on magenta", "black on bright_blue")


class TaskView:
    """Shows results; ``output`` is the folder for files, None where none are to be written."""

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self._num_files = 0

    def show(self, result: results.TaskResult, given: Any) -> None:
        """One result, with the input it answers."""
        if result.error is not None:
            terminal.err.print(f"[bold red]error[/] input {result.index}: {escape(str(result.error))}")
        elif result.kind not in _SHOWERS:
            terminal.warn(f"input {result.index}: a result of a kind that this client does not know")
        else:
            _SHOWERS[result.kind](self, result.value, given)

    def save(self, data: bytes, name: str, suffix: str) -> str:
        """Where the file is, or how large it would be."""
        if self._output is None:
            return f"[dim]{terminal.in_bytes(len(data))}; --output FOLDER keeps it[/]"
        self._output.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        safe = "".join(char if char.isalnum() else "-" for char in name.lower())[:40].strip("-") or "result"
        path = self._output / f"{self._num_files:03d}-{safe}{suffix}"
        path.write_bytes(data)
        return escape(str(path))


def _bar(score: float) -> str:
    filled = round(max(0.0, min(score, 1.0)) * _BAR_WIDTH)
    return f"[cyan]{'━' * filled}[/][dim]{'─' * (_BAR_WIDTH - filled)}[/]"


def _bars(rows: list[tuple[str, float]]) -> None:
    shown = terminal.table("", "", "", right=("",))
    shown.show_header = False
    for label, score in rows:
        shown.add_row(f"[bold]{escape(label)}[/]", _bar(score), f"{score:.4f}")
    terminal.plain_table(shown)


def _labels(view: TaskView, value: results.Classification, given: Any) -> None:
    _bars([(label.label, label.score) for label in value.labels])


def _spans(view: TaskView, value: results.TokenClassification, given: Any) -> None:
    if isinstance(given, str) and value.spans:
        text = Text(given)
        kinds = sorted({span.label for span in value.spans})
        for span in value.spans:
            text.stylize(_STYLES[kinds.index(span.label) % len(_STYLES)], span.start_char, span.end_char)
        terminal.out.print(text)
    shown = terminal.table("label", "word", "from", "to", "score", right=("from", "to", "score"))
    for span in value.spans:
        shown.add_row(
            f"[bold]{escape(span.label)}[/]", escape(span.word), str(span.start_char), str(span.end_char),
            f"{span.score:.4f}",
        )  # fmt: skip
    terminal.plain_table(shown)


def _answers(view: TaskView, value: results.QuestionAnswering, given: Any) -> None:
    if not value.answers:
        terminal.note("no answer")
    for answer in value.answers:
        terminal.out.print(f"[bold]{escape(answer.text) or '(no answer)'}[/]  [dim]{_place(answer)}[/]")


def _place(answer: results.Answer) -> str:
    parts = [f"score {answer.score:.4f}"] if answer.score else []
    if answer.character_span is not None:
        parts.append(f"characters {answer.character_span.start_char} to {answer.character_span.end_char}")
    if answer.word_span is not None:
        parts.append(f"page {answer.word_span.page_index + 1}, words {answer.word_span.start_word} to "
                     f"{answer.word_span.end_word}")  # fmt: skip
    if answer.table is not None:
        cells = ", ".join(f"row {cell.row_index}, column {cell.column_index}" for cell in answer.table.cells)
        parts.append(" ".join(filter(None, [answer.table.aggregator, cells])))
    return escape("; ".join(parts))


def _fills(view: TaskView, value: results.FillMask, given: Any) -> None:
    for mask in value.masks:
        _bars([(fill.token, fill.score) for fill in mask.fills])


def _embedding(view: TaskView, value: results.Embedding, given: Any) -> None:
    terminal.out.print(_tensor(value.vector))


def _tensor(tensor: results.Tensor) -> str:
    numbers = " ".join(f"{number:+.4f}" for number in tensor.values[:_FIRST_NUMBERS])
    more = " ..." if len(tensor.values) > _FIRST_NUMBERS else ""
    return f"[bold]{' x '.join(map(str, tensor.shape))}[/]  {numbers}{more}"


def _ranking(view: TaskView, value: results.Ranking, given: Any) -> None:
    documents = given["ranking"]["documents"] if isinstance(given, Mapping) and "ranking" in given else []
    rows = []
    for found in value.documents:
        text = found.document or (documents[found.index] if found.index < len(documents) else "")
        rows.append((f"{found.index}  {text[:60]}", found.score))
    _bars(rows)


def _similarity(view: TaskView, value: results.Similarity, given: Any) -> None:
    sentences = given["similarity"]["sentences"] if isinstance(given, Mapping) and "similarity" in given else []
    names = [sentences[place][:60] if place < len(sentences) else str(place) for place in range(len(value.scores))]
    _bars(list(zip(names, value.scores, strict=True)))


def _texts(view: TaskView, value: results.GeneratedTexts, given: Any) -> None:
    for text in value.texts:
        terminal.out.print(escape(text.text))


def _transcription(view: TaskView, value: results.Transcription, given: Any) -> None:
    terminal.out.print(escape(value.text))
    for chunk in value.chunks:
        end = "" if chunk.end_s is None else f"{chunk.end_s:.2f}"
        terminal.out.print(f"[dim]{chunk.start_s:7.2f} to {end:>7}[/]  {escape(chunk.text)}")


def _objects(view: TaskView, value: results.ObjectDetection, given: Any) -> None:
    shown = terminal.table("label", "score", "box", right=("score",))
    for found in value.objects:
        shown.add_row(f"[bold]{escape(found.label)}[/]", f"{found.score:.4f}", _box(found.box))
    terminal.plain_table(shown)


def _box(box: results.BoundingBox) -> str:
    return f"{box.x_min:.0f},{box.y_min:.0f} to {box.x_max:.0f},{box.y_max:.0f}"


def _segments(view: TaskView, value: results.Segmentation, given: Any) -> None:
    for segment in value.segments:
        score = "" if segment.score is None else f" {segment.score:.4f}"
        terminal.out.print(
            f"[bold]{escape(segment.label)}[/]{score}  {view.save(segment.mask.png, segment.label, '.png')}"
        )


def _masks(view: TaskView, value: results.MaskGeneration, given: Any) -> None:
    for mask in value.masks:
        terminal.out.print(f"{mask.score:.4f}  {_box(mask.box)}  {view.save(mask.mask.png, 'mask', '.png')}")


def _depth(view: TaskView, value: results.Depth, given: Any) -> None:
    terminal.out.print(_size(value.depth) + "  " + view.save(value.depth.png, "depth", ".png"))


def _matches(view: TaskView, value: results.KeypointMatching, given: Any) -> None:
    shown = terminal.table("first", "second", "score", right=("score",))
    for match in value.matches:
        first, second = match.first, match.second
        shown.add_row(f"{first.x:.1f},{first.y:.1f}", f"{second.x:.1f},{second.y:.1f}", f"{match.score:.4f}")
    terminal.plain_table(shown)


def _picture(view: TaskView, value: results.EncodedImage, given: Any) -> None:
    terminal.out.print(_size(value) + "  " + view.save(value.png, "image", ".png"))


def _size(image: results.EncodedImage) -> str:
    return f"{image.width_pixels} x {image.height_pixels}"


def _sound(view: TaskView, value: results.Audio, given: Any) -> None:
    width = 2 if value.encoding == "pcm_s16le" else 4
    seconds = len(value.data) / max(1, width * value.channel_count * value.sampling_rate_hz)
    saved = view.save(*_sound_file(value))
    terminal.out.print(f"{seconds:.2f} s, {value.sampling_rate_hz} Hz  {saved}")


def _sound_file(value: results.Audio) -> tuple[bytes, str, str]:
    """A WAV file; samples of 32-bit floats, which the wave module cannot write, as they are."""
    if value.encoding != "pcm_s16le":
        return value.data, "sound", ".f32"
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(value.channel_count)
        file.setsampwidth(2)
        file.setframerate(value.sampling_rate_hz)
        file.writeframes(value.data)
    return target.getvalue(), "sound", ".wav"


def _decisions(view: TaskView, value: results.Decision, given: Any) -> None:
    for answer in value.answers:
        said = answer.choice or ("" if answer.score is None else f"{answer.score:.4f}")
        terminal.out.print(f"[bold]{escape(answer.name)}[/]  {escape(said)}")
        _bars([(option.label, option.score) for option in answer.options])


_SHOWERS: Mapping[str, Callable[[TaskView, Any, Any], None]] = {
    "classification": _labels,
    "token_classification": _spans,
    "question_answering": _answers,
    "fill_mask": _fills,
    "embedding": _embedding,
    "ranking": _ranking,
    "similarity": _similarity,
    "generated_text": _texts,
    "transcription": _transcription,
    "object_detection": _objects,
    "segmentation": _segments,
    "mask_generation": _masks,
    "depth": _depth,
    "keypoint_matching": _matches,
    "image": _picture,
    "audio": _sound,
    "decision": _decisions,
}
