"""``slipstream serve SERVICE``: one service in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer

from slipstream_client.cli.server_side import server


def serve(
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="inference, chat, training or adapters.")] = "",
) -> None:
    """Run one service in the foreground; `slipstream serve SERVICE --help` lists its flags.

    SIGTERM or Ctrl-C drains it: new calls are refused, running ones finish, exit code 0.
    """
    if service in ("", "-h", "--help"):
        typer.echo(context.get_help())
        raise typer.Exit(0 if service else 2)
    if "--json" in context.args:
        raise typer.BadParameter(
            "serve prints nothing but its log, to stderr; --log-format json makes that JSON Lines", param_hint="--json"
        )
    raise typer.Exit(server("serve").serve(service, context.args))
