"""``slipstream up``: all services of one machine, started, watched and stopped together."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from slipstream_client.cli import terminal
from slipstream_client.cli.server_side import server
from slipstream_client.cli.supervisor import Program, Supervisor
from slipstream_client.cli.up_view import JsonView, View
from slipstream_client.client import SlipstreamClient
from slipstream_client.settings import SERVICES

# Above the services' own grace, so that they end by themselves.
EXTRA_GRACE_S = 10.0


def up(
    data_dir: Annotated[Path | None, typer.Option(help="Folder of everything that must survive.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Model to serve: NAME, PATH or ID=SOURCE; may be repeated."),
    ] = None,
    base_port: Annotated[
        int | None, typer.Option(help="Port of inference; the others follow.", min=1, max=60_000, show_default="50051")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="slipstream.toml to read.")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Start only this service; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as inference.device=cuda; may be repeated.")
    ] = None,
    as_json: terminal.JsonFlag = False,
) -> None:
    """Start all services of this machine, watch them, and stop them on Ctrl-C or SIGTERM.

    Prints a line for each service when it serves, then `ready`. A service that dies is started again. Logs:
    DATA_DIR/logs.
    """
    backend = server("up")
    services = _chosen(backend, only)
    try:
        flags = _flags(backend, data_dir, model, base_port, set_ or [])
        settings = backend.load(config, flags)
    except backend.ConfigError as error:
        for problem in error.problems:
            terminal.err.print(f"[bold red]error[/] {escape(problem)}")
        raise typer.Exit(2) from None
    addresses = {service: settings.address_of(service) for service in services}
    for service, address in addresses.items():
        _require_free_port(service, address)
    programs = [_program(service, config, flags, settings.common.data_dir) for service in services]
    raise typer.Exit(asyncio.run(_run(programs, addresses, settings, JsonView if as_json else View)))


def _flags(
    backend: Any, data_dir: Path | None, models: list[str] | None, base_port: int | None, more: list[str]
) -> dict[str, Any]:
    """What was given, by ``section.key``."""
    flags = {
        "common.data_dir": data_dir and data_dir.resolve(),
        "common.base_port": base_port,
        "inference.models": tuple(models) if models else None,
    }
    return {**backend.flags_from(more), **{key: value for key, value in flags.items() if value is not None}}


def _chosen(backend: Any, only: list[str] | None) -> list[str]:
    """The services to start: those asked for, or all that are part of this installation."""
    for name in only or ():
        if name not in SERVICES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(SERVICES)}", param_hint="--only")
    wanted = [service for service in SERVICES if not only or service in only]
    for service in wanted:
        if not backend.is_built(service):
            terminal.warn(f"{service} is not part of this installation and is left out")
    return [service for service in wanted if backend.is_built(service)]


def _require_free_port(service: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            terminal.fail(f"{service} cannot listen at {address}: {error.strerror}; choose another --base-port")


def _program(service: str, config: Path | None, flags: dict[str, Any], data_dir: Path) -> Program:
    arguments = ["slipstream_server.cli", service]
    if config is not None:
        arguments += ["--config", str(config)]
    for key, value in flags.items():
        for each in value if isinstance(value, tuple) else (value,):
            arguments += ["--set", f"{key}={each}"]
    return Program(name=service, arguments=arguments, log_file=data_dir / "logs" / f"{service}.log")


async def _run(programs: list[Program], addresses: dict[str, str], settings: Any, show: type[View]) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    client = SlipstreamClient(
        inference_address=addresses.get("inference"),
        chat_address=addresses.get("chat"),
        training_address=addresses.get("training"),
        adapters_address=addresses.get("adapters"),
        token_file=settings.common.token_file,
        ca_cert=settings.common.tls_cert,
    )
    with show(addresses, logs=programs[0].log_file.parent) as view:
        watching = [asyncio.create_task(view.watch_service(client, service)) for service in addresses]
        if "inference" in addresses:
            watching.append(asyncio.create_task(view.watch_models(client)))

        def end_watching() -> None:
            # Before the services are told to stop: an open watch is a running call, for which a drain waits.
            view.stopping()
            for task in watching:
                task.cancel()

        grace_s = settings.common.drain_grace_s + EXTRA_GRACE_S
        try:
            return await Supervisor(programs, view.died).run(stopping, grace_s=grace_s, on_stopping=end_watching)
        finally:
            await asyncio.gather(*watching, return_exceptions=True)
            await client.close()
