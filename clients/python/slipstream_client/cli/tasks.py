"""``slipstream tasks``: what the service can be asked to do, and how each task can be told to."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from slipstream_client.cli import terminal
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.task_results import Task, TaskParameter

app = typer.Typer(no_args_is_help=True, help="Tasks: list, describe.")


@app.command("list")
@with_groups
def list_tasks(
    *,
    model: Annotated[str, typer.Option(help="Only tasks that this model can do.")] = "",
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """List the tasks."""
    tasks = target.run(lambda client: client.tasks.list(model=model))
    if as_json:
        for task in tasks:
            terminal.print_json(task)
        return
    shown = terminal.table("task", "takes", "gives", "model", "")
    for task in tasks:
        lacks = f"[yellow]needs {escape(', '.join(task.missing_packages))}[/] " if task.missing_packages else ""
        shown.add_row(
            f"[bold]{escape(task.id)}[/]",
            escape(", ".join(task.input_kinds)),
            escape(", ".join(task.result_kinds)),
            escape(task.default_model.removeprefix("models/")),
            f"{lacks}[dim]{escape(task.description)}[/]",
        )
    terminal.plain_table(shown)


@app.command("describe")
@with_groups
def describe_task(
    name: Annotated[str, typer.Argument(help="Id or alias: text-classification, ner.")],
    *,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Show one task: what it takes and gives, which models can do it, and its parameters."""
    task = target.run(lambda client: client.tasks.describe(name))
    if as_json:
        terminal.print_json(task)
        return
    terminal.facts(_facts(task))
    shown = terminal.table("parameter", "type", "default", "allowed", "")
    for parameter in task.parameters:
        shown.add_row(
            f"[bold]{escape(parameter.name)}[/]",
            parameter.type,
            escape(_default(parameter)),
            escape(_allowed(parameter)),
            f"[dim]{escape(parameter.description)}[/]",
        )
    terminal.plain_table(shown)


def _facts(task: Task) -> list[tuple[str, str]]:
    removed = task.removed_in_transformers_version
    return [
        ("task", f"[bold]{escape(task.id)}[/]"),
        ("", escape(task.description)),
        ("also", escape(", ".join(task.aliases))),
        ("takes", escape(", ".join(task.input_kinds))),
        ("gives", escape(", ".join(task.result_kinds))),
        ("classes", escape(", ".join(task.auto_classes))),
        ("families", escape(", ".join(task.families).replace("_", "-"))),
        ("model", escape(task.default_model.removeprefix("models/"))),
        ("adapters", "yes" if task.adapters_supported else ""),
        ("missing", f"[yellow]{escape(', '.join(task.missing_packages))}[/]" if task.missing_packages else ""),
        ("carried on", f"its pipeline was removed in Transformers {escape(removed)}" if removed else ""),
    ]


def _default(parameter: TaskParameter) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default_value is None else _word(parameter.default_value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _allowed(parameter: TaskParameter) -> str:
    if parameter.allowed_values:
        return ", ".join(parameter.allowed_values)
    low, high = parameter.min_value, parameter.max_value
    if low is None and high is None:
        return ""
    return f"{_number(low)}..{_number(high)}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if value.is_integer() else str(value)
