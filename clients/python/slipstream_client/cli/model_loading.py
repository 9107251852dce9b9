"""``slipstream models load, unload, delete, watch``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from slipstream_client.cli import terminal
from slipstream_client.cli.model_flags import LoadFlags
from slipstream_client.cli.model_rows import state_of
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.client import SlipstreamClient
from slipstream_client.models import Model

# A large model may be fetched for hours; whoever waits sees how far it is.
_LOAD_TIMEOUT_S = 24 * 3600.0

NameArgument = Annotated[str, typer.Argument(help="Id, or models/ID.")]
EtagOption = Annotated[str, typer.Option("--etag", help="Only if the model still has this etag.")]


@with_groups
def load_model(
    name: NameArgument,
    *,
    source: Annotated[
        str, typer.Option(help="Hub id org/name, catalogue entry, or folder of the service's model roots.")
    ] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a hub id.")] = "",
    pin: Annotated[bool | None, typer.Option("--pin/--no-pin", help="Never unload it to make room.")] = None,
    flags: LoadFlags,
    check_only: Annotated[bool, typer.Option("--check-only", help="Say whether it could be loaded.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it until it is ready.")] = True,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Make a model ready to serve, fetching it where it is not there; others may give way."""

    async def work(client: SlipstreamClient) -> Model:
        model = await client.models.load(
            name, source=source, revision=revision, pinned=pin, validate_only=check_only, **flags.options()
        )
        if check_only or not wait:
            return model
        return await followed(client, model.name, as_json=as_json)

    model = target.run(work)
    if as_json:
        terminal.print_json(model)
    elif check_only:
        size = f" and takes about {terminal.in_bytes(model.memory_bytes)}" if model.memory_bytes else ""
        terminal.out.print(f"[green]✓[/] [bold]{escape(model.id)}[/] can be loaded{size}")
    else:
        _say(model)


@with_groups
def unload_model(
    name: NameArgument,
    *,
    grace: Annotated[float | None, typer.Option(help="Seconds for running requests.", show_default="30")] = None,
    force: Annotated[bool, typer.Option("--force", help="Although it is pinned.")] = False,
    etag: EtagOption = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it until it is unloaded.")] = True,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Take a model out of memory; it stays known, and on disk."""

    async def work(client: SlipstreamClient) -> Model:
        model = await client.models.unload(name, grace_s=grace, force=force, etag=etag)
        return await followed(client, model.name, as_json=as_json) if wait else model

    model = target.run(work)
    if as_json:
        terminal.print_json(model)
    else:
        _say(model)


@with_groups
def delete_model(
    name: NameArgument, *, etag: EtagOption = "", as_json: terminal.JsonFlag = False, target: Target
) -> None:
    """Forget an unloaded model, and delete its files where the service made them."""
    target.run(lambda client: client.models.delete(name, etag=etag))
    terminal.deleted(name, as_json)


@with_groups
def watch_models(
    names: Annotated[list[str] | None, typer.Argument(help="Only these; unset: all.")] = None,
    *,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Follow models, a line for every change, until Ctrl-C."""

    async def work(client: SlipstreamClient) -> None:
        async with aclosing(client.models.watch(*names or ())) as models:
            async for model in models:
                if as_json:
                    terminal.print_json(model)
                else:
                    _say(model)

    target.run(work)


async def followed(client: SlipstreamClient, name: str, *, as_json: bool) -> Model:
    """The model once it is ready or unloaded, its progress shown meanwhile. Ctrl-C ends the watch, not the load."""
    try:
        if as_json:
            return await client.models.wait(name, timeout_s=_LOAD_TIMEOUT_S)
        with _bar() as bar:
            task = bar.add_task(name.rpartition("/")[2], total=None)

            def show(model: Model) -> None:
                fraction = model.progress.fraction if model.progress else None
                stage = model.progress.stage if model.progress else model.state
                bar.update(
                    task,
                    description=f"[bold]{escape(model.id)}[/] {escape(stage)}",
                    completed=fraction or 0.0,
                    total=None if fraction is None else 1.0,
                )

            return await client.models.wait(name, on_change=show, timeout_s=_LOAD_TIMEOUT_S)
    except asyncio.CancelledError:
        terminal.note(f"\nthe service goes on: slipstream models watch {name.rpartition('/')[2]}")
        raise


@contextmanager
def _bar() -> Iterator[Bar]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bar(*columns, console=terminal.err, transient=True, disable=not terminal.err.is_terminal) as bar:
        yield bar


def _say(model: Model) -> None:
    mark = {"ready": "[green]✓[/]", "unloaded": "[green]✓[/]", "failed": "[red]✗[/]"}.get(model.state, "[cyan]…[/]")
    quantization = "" if model.quantization == "none" else model.quantization
    more = " ".join(filter(None, [" ".join(model.devices), model.data_type, quantization, model.batching]))
    memory = terminal.in_bytes(model.memory_bytes) if model.memory_bytes else ""
    held = " ".join(filter(None, [more, memory]))
    terminal.out.print(f"{mark} [bold]{escape(model.id)}[/] {state_of(model)} [dim]{held}[/]")
