"""``slipstream adapters``: versions, and which of them is live."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from slipstream_client.adapter_results import Adapter, AdapterAlias, AdapterVersion, AliasMove
from slipstream_client.cli import terminal
from slipstream_client.cli.adapter_view import (
    adapter_facts,
    adapter_table,
    print_move,
    version_facts,
    version_table,
)
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.cli.uploading import transfer_bar
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import NotFoundError

app = typer.Typer(no_args_is_help=True, help="Adapters: list, promote, roll back.")

MAX_AT_ONCE = 16
NameArgument = Annotated[str, typer.Argument(help="Id of the adapter.")]
ReferenceArgument = Annotated[str, typer.Argument(help="NAME@v3, NAME@ALIAS, or NAME for its live version.")]
AliasOption = Annotated[str, typer.Option("--alias", help="The alias to move.")]
GenerationOption = Annotated[
    int | None,
    typer.Option(help="Only if the alias has this generation (0: none yet).", show_default=False, min=0),
]
CommentOption = Annotated[str, typer.Option("--comment", "-m", help="Why, for the history.")]


@app.command("list")
@with_groups
def list_adapters(
    *,
    base: Annotated[str, typer.Option("--base", help="Only adapters of this base model.")] = "",
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """List the adapters, and where their aliases point."""
    adapters, aliases = target.run(lambda client: _overview(client, base))
    if as_json:
        for adapter in adapters:
            terminal.print_json(adapter)
    elif adapters:
        terminal.plain_table(adapter_table(adapters, aliases))
    else:
        terminal.note("there are no adapters; `slipstream train` or `slipstream adapters upload` makes one")


async def _overview(client: SlipstreamClient, base: str) -> tuple[list[Adapter], dict[str, list[AdapterAlias]]]:
    adapters = await client.adapters.list(base_model=base)
    gate = asyncio.Semaphore(MAX_AT_ONCE)

    async def aliases_of(adapter: Adapter) -> list[AdapterAlias]:
        async with gate:
            return await client.adapters.aliases.list(adapter.id)

    found = await asyncio.gather(*map(aliases_of, adapters))
    return adapters, {adapter.name: aliases for adapter, aliases in zip(adapters, found, strict=True)}


@app.command("get")
@with_groups
def get_adapter(
    name: Annotated[str, typer.Argument(help="An adapter, or one of its versions: NAME, NAME@v3, NAME@live.")],
    *,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Show an adapter with its aliases and versions, or one version in full."""
    if "@" in name or "/versions/" in name or "/aliases/" in name:
        version = target.run(lambda client: client.adapters.versions.get(name))
        if as_json:
            terminal.print_json(version)
        else:
            terminal.facts(version_facts(version))
        return
    adapter, aliases, versions = target.run(lambda client: _whole(client, name))
    if as_json:
        terminal.print_json({"adapter": adapter, "aliases": aliases, "versions": versions})
        return
    terminal.facts(adapter_facts(adapter, aliases))
    if versions:
        terminal.out.print()
        terminal.plain_table(version_table(versions))


async def _whole(client: SlipstreamClient, name: str) -> tuple[Adapter, list[AdapterAlias], list[AdapterVersion]]:
    adapters = client.adapters
    return await asyncio.gather(adapters.get(name), adapters.aliases.list(name), adapters.versions.list(name))


@app.command("versions")
@with_groups
def list_versions(
    name: NameArgument,
    *,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; unset: all but retired.")] = None,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """List the versions of an adapter, newest first."""
    versions = target.run(lambda client: client.adapters.versions.list(name, states=state or ()))
    if as_json:
        for version in versions:
            terminal.print_json(version)
    elif versions:
        terminal.plain_table(version_table(versions))
    else:
        terminal.note(f"{name} has no versions")


@app.command("promote")
@with_groups
def promote(
    name: NameArgument,
    version: Annotated[str, typer.Argument(help="v3, or another alias: NAME@candidate.")],
    *,
    alias: AliasOption = "live",
    expected_generation: GenerationOption = None,
    override_gate: Annotated[bool, typer.Option("--override-gate", help="Move it though its gate is closed.")] = False,
    comment: CommentOption = "",
    check_only: Annotated[bool, typer.Option("--check-only", help="Say whether it could be moved.")] = False,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Point an alias at a version; requests that start from then on are answered by it, without a restart."""

    async def work(client: SlipstreamClient) -> tuple[AliasMove, str]:
        before = await _position(client, name, alias)
        move = await client.adapters.aliases.set(
            f"{name}@{alias}",
            version,
            expected_generation=expected_generation,
            override_gate=override_gate,
            comment=comment,
            validate_only=check_only,
        )
        return (AliasMove(alias=None, unconfirmed_replicas=()) if check_only else move), before

    _say_moved(*target.run(work), as_json)


@app.command("rollback")
@with_groups
def roll_back(
    name: NameArgument,
    *,
    alias: AliasOption = "live",
    to_generation: Annotated[
        int | None, typer.Option(help="Back to where it was then; unset: one step.", show_default=False, min=1)
    ] = None,
    expected_generation: GenerationOption = None,
    comment: CommentOption = "",
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Point an alias back at the version it had before."""

    async def work(client: SlipstreamClient) -> tuple[AliasMove, str]:
        before = await _position(client, name, alias)
        move = await client.adapters.aliases.roll_back(
            f"{name}@{alias}",
            expected_generation=expected_generation,
            target_generation=to_generation,
            comment=comment,
        )
        return move, before

    _say_moved(*target.run(work), as_json)


async def _position(client: SlipstreamClient, name: str, alias: str) -> str:
    """Where the alias points now; empty where there is none."""
    try:
        return (await client.adapters.aliases.get(f"{name}@{alias}")).version.rpartition("/")[2]
    except NotFoundError:
        return ""


def _say_moved(move: AliasMove, before: str, as_json: bool) -> None:
    if as_json:
        terminal.print_json(move)
    else:
        print_move(move, before)


@app.command("upload")
@with_groups
def upload(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(help="Folder that PEFT saved: config and safetensors.")],
    *,
    base: Annotated[str, typer.Option("--base", help="Its base model, where the config does not say it.")] = "",
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Register a trained adapter as the next version of NAME, which is made if new."""

    async def work(client: SlipstreamClient) -> AdapterVersion:
        with transfer_bar() as report:
            return await client.adapters.upload(name, folder, base_model=base, on_progress=report)

    version = target.run(work)
    if as_json:
        terminal.print_json(version)
    else:
        size = terminal.in_bytes(version.size_bytes)
        terminal.out.print(f"[green]✓[/] [bold]{escape(version.short)}[/] {version.state} [dim]{size}[/]")


@app.command("download")
@with_groups
def download(
    name: ReferenceArgument,
    folder: Annotated[Path | None, typer.Argument(help="Where to; unset: a folder of its name here.")] = None,
    *,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Fetch a version's files, as PEFT reads them, and check their hashes."""

    async def work(client: SlipstreamClient) -> tuple[AdapterVersion, Path]:
        version = await client.adapters.versions.get(name)
        place = folder or Path(version.short.replace("@", "-"))
        with transfer_bar() as report:
            return await client.adapters.download(version.name, place, on_progress=report), place

    version, place = target.run(work)
    if as_json:
        terminal.print_json({"folder": str(place), "version": version})
    else:
        terminal.out.print(f"[green]✓[/] [bold]{escape(version.short)}[/] is in {escape(str(place))}")


@app.command("delete")
@with_groups
def delete(
    name: Annotated[str, typer.Argument(help="An adapter NAME, a version NAME@v3, or an alias NAME@ALIAS.")],
    *,
    force: Annotated[bool, typer.Option("--force", help="An adapter's versions and aliases too.")] = False,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Delete an adapter, retire one version, or delete an alias."""
    _, _, part = name.partition("@")

    async def work(client: SlipstreamClient) -> None:
        if not part:
            await client.adapters.delete(name, force=force)
        elif part[0] == "v" and part[1:].isdigit():
            await client.adapters.versions.delete(name)
        else:
            await client.adapters.aliases.delete(name)

    target.run(work)
    terminal.deleted(name, as_json)
