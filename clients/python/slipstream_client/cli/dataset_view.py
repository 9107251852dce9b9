"""Datasets on a terminal: their rows, what is wrong with them, and which tokens are learned."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from slipstream_client.cli import terminal
from slipstream_client.cli.model_rows import progress_in_words
from slipstream_client.datasets import Dataset, DatasetPreview, PreviewRow, RowError

COLOURS = {"ready": "green", "invalid": "yellow", "failed": "red", "importing": "cyan", "validating": "cyan"}
LEARNED_STYLE, READ_STYLE = "black on green", "dim"
# Where there are no colours.
LEARNED_MARKS = ("⟦", "⟧")
SHOWN_ERRORS = 20


def dataset_table(datasets: Iterable[Dataset]) -> Table:
    """One row for each dataset."""
    rows = terminal.table("dataset", "state", "format", "rows", "splits", "size", "age", right=("rows", "size"))
    for dataset in datasets:
        invalid = f" [yellow]{dataset.invalid_row_count} bad[/]" if dataset.invalid_row_count else ""
        rows.add_row(
            f"[bold]{escape(dataset.id)}[/]",
            state_of(dataset),
            dataset.format.replace("_", " "),
            f"{dataset.row_count}{invalid}",
            splits_in_words(dataset),
            terminal.in_bytes(dataset.size_bytes),
            terminal.age(dataset.create_time),
        )
    return rows


def state_of(dataset: Dataset) -> str:
    """The state in colour, with what is known about it."""
    more = str(dataset.error or "") or dataset.state_message
    if not more and dataset.progress is not None:
        more = progress_in_words(dataset.progress)
    return f"[{COLOURS.get(dataset.state, 'dim')}]{dataset.state or 'checked'}[/]" + (
        f" [dim]{escape(more)}[/]" if more else ""
    )


def splits_in_words(dataset: Dataset) -> str:
    return " · ".join(f"{escape(split.name)} {split.row_count}" for split in dataset.splits)


def facts_of(dataset: Dataset) -> list[tuple[str, str]]:
    """Label and value."""
    invalid = (
        f" [yellow]{dataset.invalid_row_count} of them cannot be trained on[/]" if dataset.invalid_row_count else ""
    )
    mapping = ", ".join(f"{field} ← {source}" for field, source in dataset.field_mapping.items())
    return [
        ("dataset", f"[bold]{escape(dataset.id)}[/] {escape(dataset.display_name)}"),
        ("state", state_of(dataset)),
        ("format", dataset.format.replace("_", " ")),
        ("rows", f"{dataset.row_count}{invalid}" if dataset.row_count else ""),
        ("splits", splits_in_words(dataset)),
        ("fields", escape(", ".join(dataset.field_names))),
        ("mapping", escape(mapping)),
        ("classes", escape(", ".join(dataset.class_labels))),
        ("source", escape(" @ ".join(filter(None, [dataset.source, dataset.revision])))),
        ("size", terminal.in_bytes(dataset.size_bytes) if dataset.size_bytes else ""),
        ("digest", dataset.digest),
        ("by", escape(dataset.owner)),
    ]


def print_errors(dataset: Dataset) -> None:
    """The rows that cannot be trained on, as a table, and how many there are of each kind."""
    if not dataset.row_errors:
        return
    terminal.plain_table(error_table(dataset.row_errors[:SHOWN_ERRORS]))
    total = sum(count.count for count in dataset.error_counts)
    if total > min(SHOWN_ERRORS, len(dataset.row_errors)):
        kinds = ", ".join(f"{count.count} {count.reason.replace('_', ' ')}" for count in dataset.error_counts)
        terminal.note(f"{total} errors in all: {kinds}")


def error_table(errors: Iterable[RowError]) -> Table:
    """One row for each error."""
    rows = terminal.table("line", "field", "what", "", right=("line",))
    for error in errors:
        # No line: the file as a whole.
        line = f":[bold]{error.line_number}[/]" if error.line_number else ""
        rows.add_row(
            f"{escape(error.path)}{line}",
            escape(error.field),
            f"[yellow]{error.reason.replace('_', ' ')}[/]",
            escape(error.message),
        )
    return rows


def print_preview(preview: DatasetPreview) -> None:
    """Every row as a job would see it."""
    for row in preview.rows:
        terminal.out.print(_title(row))
        if row.errors:
            terminal.plain_table(error_table(row.errors))
        elif row.tokens:
            terminal.out.print(_tokens(row))
        else:
            terminal.out.print(_fields(row))
        terminal.out.print()
    if any(row.tokens for row in preview.rows):
        terminal.note(_legend(preview))


def _title(row: PreviewRow) -> Text:
    learned = sum(token.in_loss for token in row.tokens)
    parts = [f"line {row.line_number}"] if row.line_number else []
    if row.tokens:
        parts.append(f"{len(row.tokens)} tokens, {learned} learned")
    if row.truncated:
        parts.append("cut")
    return Text.assemble((f"row {row.row_index}", "bold"), ("  " + " · ".join(parts), "dim"))


def _tokens(row: PreviewRow) -> Text:
    """The text the model reads; what it is to learn to write stands out."""
    coloured = terminal.out.is_terminal and not terminal.out.no_color
    shown = Text()
    before = False
    for token in row.tokens:
        if not coloured and token.in_loss != before:
            shown.append(LEARNED_MARKS[0] if token.in_loss else LEARNED_MARKS[1])
        text = token.text.replace("\n", "⏎\n")
        shown.append(text, (LEARNED_STYLE if token.in_loss else READ_STYLE) if coloured else "")
        before = token.in_loss
    if not coloured and before:
        shown.append(LEARNED_MARKS[1])
    shown.rstrip()
    return shown


def _fields(row: PreviewRow) -> Text:
    shown = Text()
    for name, value in row.fields.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown.append(f"{name}: ", "dim").append(f"{text}\n")
    shown.rstrip()
    return shown


def _legend(preview: DatasetPreview) -> str:
    coloured = terminal.out.is_terminal and not terminal.out.no_color
    learned = "green" if coloured else f"{LEARNED_MARKS[0]} {LEARNED_MARKS[1]}"
    statistics = preview.token_statistics
    if statistics is None:
        return f"{learned}: learned"
    cut = f", {statistics.truncated_row_count} cut" if statistics.truncated_row_count else ""
    return (
        f"{learned}: learned · of {statistics.row_count} rows the shortest has {statistics.min_tokens}, the median "
        f"{statistics.median_tokens}, the longest {statistics.max_tokens} tokens{cut}"
    )
