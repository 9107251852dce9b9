"""What ``slipstream up`` shows: a line for each service as it becomes SERVING, how far a model is, and deaths with
the tail of the log.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from slipstream_client.cli import terminal
from slipstream_client.cli.model_rows import progress_in_words
from slipstream_client.cli.supervisor import Died
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import SlipstreamClientError
from slipstream_client.models import Model

RETRY_S = 0.3
MODEL_RETRY_S = 1.0
# A watch has no natural end.
WATCH_S = 86_400.0
QUIET_STATES = frozenset({"ready", "failed", "unloaded"})
BUSY_STATES = frozenset({"downloading", "loading", "creating", "restarting", "unloading"})


class View:
    """The screen of one ``slipstream up``.

    Lives on the event loop; the spinner alone has a thread, which only draws.
    """

    def __init__(self, addresses: Mapping[str, str], *, logs: Path) -> None:
        self._addresses = addresses
        self._logs = logs
        self._began_s = time.monotonic()
        self._serving: set[str] = set()
        # What each model is doing, and how much of it is done where that is known.
        self._models: dict[str, tuple[str, float | None]] = {}
        self._was_ready = False
        self._is_stopping = False
        self._live = Live(console=terminal.out, transient=True, refresh_per_second=8)

    def __enter__(self) -> Self:
        if terminal.out.is_terminal:
            self._live.start()
        self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._is_stopping:
            self._say_stopped()

    async def watch_service(self, client: SlipstreamClient, service: str) -> None:
        """Follow the health of one service, for ever."""
        stub = health_pb2_grpc.HealthStub(client.connection.channel(service))
        token = client.settings.token
        headers = (("authorization", f"Bearer {token}"),) if token else None
        while True:
            call = stub.Watch(health_pb2.HealthCheckRequest(), metadata=headers)
            try:
                async for answer in call:
                    self._note_health(service, answer.status == health_pb2.HealthCheckResponse.SERVING)
            except grpc.aio.AioRpcError:
                self._note_health(service, False)
            finally:
                call.cancel()
            await asyncio.sleep(RETRY_S)

    async def watch_models(self, client: SlipstreamClient) -> None:
        """Follow the models of the inference service, for ever; where it does not tell of them, nothing is shown."""
        while True:
            try:
                async for model in client.models.watch(timeout_s=WATCH_S):
                    self._note_model(model)
            except SlipstreamClientError as error:
                if error.code is grpc.StatusCode.UNIMPLEMENTED:
                    return
            await asyncio.sleep(MODEL_RETRY_S)

    def died(self, death: Died) -> None:
        """Say loudly that a service ended unasked."""
        self._serving.discard(death.name)
        self._say_died(death)
        self._refresh()

    def _say_died(self, death: Died) -> None:
        fate = "giving up" if death.restart_in_s is None else f"starting it again in {death.restart_in_s:g} s"
        cause = f"exit code {death.exit_code}" if death.exit_code >= 0 else f"signal {-death.exit_code}"
        terminal.out.print(f"[bold red]{death.name} died[/] ({cause}); {fate}")
        for line in death.tail:
            terminal.out.print(Text(f"  │ {readable(line)}", style="dim"))
        terminal.out.print(Text(f"  ╰ {death.log_file}", style="dim"))

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._is_stopping = True
        self._say_stopping()
        self._refresh()

    def _say_stopping(self) -> None:
        terminal.out.print("stopping …" if terminal.out.is_terminal else "stopping")

    def _say_stopped(self) -> None:
        terminal.out.print("stopped")

    def _note_health(self, service: str, is_serving: bool) -> None:
        if self._is_stopping or is_serving == (service in self._serving):
            return
        if is_serving:
            self._serving.add(service)
            self._say_health(service, is_serving=True)
        else:
            self._serving.discard(service)
            self._say_health(service, is_serving=False)
        self._refresh()
        if not self._was_ready and self._serving == set(self._addresses):
            self._was_ready = True
            self._say_ready()

    def _say_health(self, service: str, *, is_serving: bool) -> None:
        state, colour = ("SERVING", "green") if is_serving else ("NOT_SERVING", "yellow")
        after = f"[dim]{time.monotonic() - self._began_s:6.1f} s[/]" if terminal.out.is_terminal else ""
        line = f"[bold]{service:<9}[/] [{colour}]{state}[/] {self._addresses[service]} {after}"
        terminal.out.print(line.rstrip())

    def _say_ready(self) -> None:
        if terminal.out.is_terminal:
            terminal.out.print(
                Text(f"logs: {self._logs} · talk to it: slipstream chat · Ctrl-C stops everything", "dim")
            )
        terminal.out.print("[bold green]ready[/]")

    def _note_model(self, model: Model) -> None:
        before = self._models.get(model.id, ("", None))[0]
        now = self._in_words(model)
        self._models[model.id] = (now, model.progress.fraction if model.progress else None)
        self._refresh()
        if now != before:
            self._say_model(model, now, is_new=not before)

    def _say_model(self, model: Model, now: str, *, is_new: bool) -> None:
        if model.state == "failed":
            terminal.out.print(f"[bold red]model {escape(model.id)} failed[/] {escape(model.note)}")
        elif model.state == "ready" and not is_new:
            terminal.out.print(f"[dim]model {escape(model.id)} ready[/]")
        elif not terminal.out.is_terminal and model.state in BUSY_STATES:
            terminal.out.print(f"model {escape(model.id)} {escape(now)}")

    def _in_words(self, model: Model) -> str:
        """What the model is doing; without numbers where each change would be a line of its own."""
        if model.state not in BUSY_STATES:
            return model.state
        if model.progress is None or not model.progress.stage:
            return model.state_message or model.state
        return progress_in_words(model.progress) if self._counts_percent() else model.progress.stage

    def _counts_percent(self) -> bool:
        """Whether each percent may be shown: not where it would be a line of its own."""
        return terminal.out.is_terminal

    def _refresh(self) -> None:
        """Draw what is still to come: services that do not serve yet, and models on their way."""
        if not terminal.out.is_terminal:
            return
        rows = Table.grid(padding=(0, 1))
        for name in [] if self._is_stopping else self._addresses:
            if name not in self._serving:
                rows.add_row(Spinner("dots", style="dim"), Text(f"{name:<9}", "dim"), Text("starting", "dim"))
        for name, (words, fraction) in self._models.items():
            if words not in QUIET_STATES and not self._is_stopping:
                bar = ProgressBar(total=1.0, completed=fraction, width=24) if fraction is not None else ""
                rows.add_row(Spinner("dots", style="dim"), Text(f"{name:<9}", "dim"), Text(words, "dim"), bar)
        self._live.update(rows, refresh=True)


class JsonView(View):
    """The same as JSON Lines, one object for each change; nothing is drawn."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_stopping:
            self._say_stopped()

    def _print(self, event: str, **more: Any) -> None:
        terminal.print_json({"event": event, "time": datetime.now(UTC), **more})

    def _say_health(self, service: str, *, is_serving: bool) -> None:
        state = "serving" if is_serving else "not_serving"
        self._print("service", service=service, state=state, address=self._addresses[service])

    def _say_ready(self) -> None:
        self._print("ready", addresses=self._addresses, logs=str(self._logs))

    def _say_model(self, model: Model, now: str, *, is_new: bool) -> None:
        self._print("model", model=model.id, state=model.state, message=model.note or now)

    def _say_died(self, death: Died) -> None:
        self._print(
            "died",
            service=death.name,
            exit_code=death.exit_code,
            restart_in_s=death.restart_in_s,
            log_file=str(death.log_file),
            log_tail=[readable(line) for line in death.tail],
        )

    def _say_stopping(self) -> None:
        self._print("stopping")

    def _say_stopped(self) -> None:
        self._print("stopped")

    def _counts_percent(self) -> bool:
        return False

    def _refresh(self) -> None:
        """Nothing is drawn."""


def readable(line: str) -> str:
    """A line of a log; what a service wrote as JSON becomes level, message and the end of the traceback."""
    try:
        record = json.loads(line)
        said = f"{record['level']} {record['message']}"
    except (ValueError, KeyError, TypeError):
        return line
    why = str(record.get("exception", "")).strip().rpartition("\n")[2]
    return f"{said}: {why}" if why else said
