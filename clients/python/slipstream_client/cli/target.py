"""Which services a command talks to: the options that every client verb has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from slipstream_client.client import SlipstreamClient

Result = TypeVar("Result")
PANEL = "Connection"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The options that name the services; what is unset comes from SLIPSTREAM_* and the defaults."""

    address: Annotated[
        str | None,
        typer.Option(
            help="HOST or HOST:PORT of inference; the others follow on the next ports.", rich_help_panel=PANEL
        ),
    ] = None
    token_file: Annotated[
        Path | None, typer.Option(help="File whose first token is shown to the services.", rich_help_panel=PANEL)
    ] = None
    tls: Annotated[
        bool | None, typer.Option("--tls/--no-tls", help="Speak TLS.", show_default=False, rich_help_panel=PANEL)
    ] = None
    ca_cert: Annotated[
        Path | None, typer.Option(help="PEM file of the authority to trust; implies --tls.", rich_help_panel=PANEL)
    ] = None
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout", help="Seconds until a call is given up.", show_default="600", rich_help_panel=PANEL),
    ] = None

    def client(self) -> SlipstreamClient:
        """A client of these services."""
        return SlipstreamClient(
            self.address,
            token_file=self.token_file,
            tls=self.tls,
            ca_cert=self.ca_cert,
            timeout_s=self.timeout_s,
        )

    def run(self, work: Callable[[SlipstreamClient], Awaitable[Result]]) -> Result:
        """Run ``work`` with a client, on an event loop of its own.

        Ctrl-C cancels the running call and ends the command with 130.
        """
        return asyncio.run(self._run(work))

    async def _run(self, work: Callable[[SlipstreamClient], Awaitable[Result]]) -> Result:
        async with self.client() as client:
            return await work(client)
