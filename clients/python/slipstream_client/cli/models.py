"""``slipstream models``: what a running service knows, and what can be fetched to this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from slipstream_client.cli import terminal
from slipstream_client.cli.model_loading import delete_model, load_model, unload_model, watch_models
from slipstream_client.cli.model_making import create_model, estimate_model, export_model, recommend_models
from slipstream_client.cli.model_rows import model_table, state_of
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.server_side import server
from slipstream_client.cli.target import Target
from slipstream_client.models import Model

app = typer.Typer(no_args_is_help=True, help="Models: list, load, make, export, choose.")


@app.command("list")
@with_groups
def list_models(
    *,
    task: Annotated[str, typer.Option(help="Only models that can do this task.")] = "",
    catalogue: Annotated[
        bool, typer.Option("--catalogue", help="What can be pulled to this machine, without asking a service.")
    ] = False,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """List the models of the inference service, or those of the catalogue."""
    if catalogue:
        _list_catalogue(task, as_json)
        return
    models = target.run(lambda client: client.models.list(task=task))
    if as_json:
        for model in models:
            terminal.print_json(model)
    elif models:
        terminal.plain_table(model_table(models))
    else:
        terminal.note("the service knows no model; `slipstream models list --catalogue` shows what can be pulled")


def _list_catalogue(task: str, as_json: bool) -> None:
    rows = [row for row in server("models list --catalogue").list_models() if not task or task in row.tasks]
    if as_json:
        for row in rows:
            terminal.print_json(row)
        return
    shown = terminal.table("name", "here", "size", "to fetch", "licence", "", right=("size", "to fetch"))
    for row in rows:
        here = row.state == "cached"
        shown.add_row(
            f"[bold]{escape(row.name)}[/]",
            "[green]✓[/]" if here else "",
            terminal.in_short(row.num_parameters),
            "" if here else terminal.in_bytes(row.size_bytes),
            escape(row.license),
            f"[dim]{escape(row.description)}[/]",
        )
    terminal.plain_table(shown)


@app.command("get")
@with_groups
def get_model(
    name: Annotated[str, typer.Argument(help="Id, or models/ID.")],
    *,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Show one model of the inference service."""
    model = target.run(lambda client: client.models.get(name))
    if as_json:
        terminal.print_json(model)
        return
    terminal.facts(_facts(model))


def _facts(model: Model) -> list[tuple[str, str]]:
    slots = f"{len(model.loaded_adapter_versions)} of {model.adapter_slot_count} slots"
    quantization = "" if model.quantization == "none" else model.quantization
    held = " ".join(filter(None, [model.data_type, quantization, model.batching]))
    return [
        ("model", f"[bold]{escape(model.id)}[/]"),
        ("state", state_of(model)),
        ("source", escape(" @ ".join(filter(None, [model.source, model.revision])))),
        ("base", escape(model.base_model)),
        ("architecture", escape(model.architecture)),
        ("parameters", terminal.in_short(model.parameter_count) if model.parameter_count else ""),
        ("context", f"{model.context_tokens} tokens" if model.context_tokens else ""),
        ("held as", held),
        ("devices", " ".join(model.devices)),
        ("memory", terminal.in_bytes(model.memory_bytes) if model.memory_bytes else ""),
        ("on disk", terminal.in_bytes(model.disk_bytes) if model.disk_bytes else ""),
        ("chat template", "yes" if model.has_chat_template else "no"),
        ("adapters", slots if model.adapter_slot_count else ""),
        ("tasks", escape(", ".join(model.tasks))),
        ("labels", escape(", ".join(model.labels))),
        ("licence", escape(model.licence)),
        ("asked for", escape(", ".join(f"{name}={value}" for name, value in (model.load_options or {}).items()))),
        ("pinned", "yes" if model.pinned else ""),
        ("made by", escape(model.training_job)),
        ("owner", escape(model.owner)),
    ]


app.command("load")(load_model)
app.command("unload")(unload_model)
app.command("delete")(delete_model)
app.command("watch")(watch_models)
app.command("create")(create_model)
app.command("export")(export_model)
app.command("estimate")(estimate_model)
app.command("recommend")(recommend_models)


@app.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(help="Catalogue name, hub id org/name, folder, or .gguf file.")],
    as_json: terminal.JsonFlag = False,
) -> None:
    """Fetch a model to this machine, so that serving it needs no network later."""
    backend = server("models pull")
    try:
        prepared = _pull_with_lines(backend, name) if as_json else _pull_with_bar(backend, name)
    except backend.SlipstreamError as error:
        terminal.fail(f"{error.message} (reason {error.reason})")
    if as_json:
        terminal.print_json({"event": "ready", **_plain(prepared)})
    else:
        terminal.out.print(f"[green]✓[/] [bold]{escape(prepared.name)}[/] is ready [dim]{escape(prepared.source)}[/]")


def _plain(prepared: Any) -> dict[str, Any]:
    values = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _pull_with_lines(backend: Any, name: str) -> Any:
    def report(progress: Any) -> None:
        if progress.stage != "ready":
            terminal.print_json({"event": "progress", **_plain(progress)})

    return backend.pull(name, report)


def _pull_with_bar(backend: Any, name: str) -> Any:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=terminal.err, transient=True) as bar:
        task = bar.add_task(escape(name), total=None, amount="")

        def report(progress: Any) -> None:
            fraction = progress.fraction
            bar.update(
                task,
                description=f"{progress.stage} [bold]{escape(progress.source or name)}[/]",
                completed=fraction or 0.0,
                total=None if fraction is None else 1.0,
                amount=_amount(progress),
            )

        return backend.pull(name, report)


def _amount(progress: Any) -> str:
    if progress.total_bytes:
        return f"{terminal.in_bytes(progress.done_bytes)} of {terminal.in_bytes(progress.total_bytes)}"
    return "" if progress.fraction is None else f"{progress.fraction:.0%}"
