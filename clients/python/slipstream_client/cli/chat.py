"""``slipstream chat``: talk to a model.

At a terminal with history and editing; with stdin from elsewhere, one line is one turn.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

from slipstream_client.cli import chat_view, terminal
from slipstream_client.cli.chat_commands import Next, look_up_context, run_command
from slipstream_client.cli.chat_prompt import ChatPrompt
from slipstream_client.cli.chat_session import ChatSession, Turn
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.sampling import AnswerFlags
from slipstream_client.cli.target import Target
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import SlipstreamClientError, UnavailableError
from slipstream_client.results import ChatDelta, HealthState
from slipstream_client.streams import AnswerStream

ReadLine = Callable[[], Awaitable[str | None]]
Show = Callable[[AnswerStream[ChatDelta]], Awaitable[Turn]]


@with_groups
def chat(
    *,
    system: Annotated[str, typer.Option("--system", "-s", help="Instructions before the chat.")] = "",
    load: Annotated[Path | None, typer.Option(help="Go on with a chat that /save wrote.")] = None,
    answer: AnswerFlags,
    as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
    target: Target,
) -> None:
    """Chat with a model; /help inside shows what can be done.

    Without a terminal each line of stdin is one turn: `printf 'Hi\\nTell me more\\n' | slipstream chat`
    """
    if as_json:
        raise typer.BadParameter("chat is interactive; `slipstream generate --chat --json` is for programs")
    session = ChatSession(options=answer.options(), system=system)
    if load is not None:
        _load(session, load)

    async def work(client: SlipstreamClient) -> int:
        await _require_chat(client)
        if terminal.is_interactive():
            await look_up_context(session, client)
            _greet(session)
            return await _talk(session, client, ChatPrompt(session, _history_file()).read, chat_view.show_rendered)
        return await _read_script(session, client)

    raise typer.Exit(target.run(work))


def _load(session: ChatSession, file: Path) -> None:
    try:
        options, system = session.options, session.system
        session.load(file)
    except OSError as error:
        terminal.fail(f"{file}: {error.strerror}")
    session.options |= options
    session.system = system or session.system


async def _require_chat(client: SlipstreamClient) -> None:
    health = await client.health("chat")
    if health.state is HealthState.UNREACHABLE:
        raise UnavailableError(health.problem)


def _greet(session: ChatSession) -> None:
    context = f" · {session.context_tokens} tokens of context" if session.context_tokens else ""
    terminal.out.print(f"[bold]{escape(session.model or 'slipstream')}[/][dim]{context} · /help · Ctrl-D leaves[/]")


def _history_file() -> Path:
    """Where what was typed is kept for the arrow keys, readable by its owner only."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    folder = state / "slipstream"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / "chat_history"
    file.touch(mode=0o600, exist_ok=True)
    return file


async def _talk(session: ChatSession, client: SlipstreamClient, read: ReadLine, show: Show) -> int:
    """The conversation at a terminal; a failed turn is shown and taken back, and the chat goes on."""
    while (line := await read()) is not None:
        if not line.strip():
            continue
        step = await _take(line, session, client)
        if step is Next.LEAVE:
            break
        if step is Next.ANSWER:
            try:
                await _answer(session, client, show)
            except SlipstreamClientError as error:
                session.take_back()
                terminal.print_failure(error)
    return 0


async def _take(line: str, session: ChatSession, client: SlipstreamClient) -> Next:
    """A line: a command, or something said."""
    if line.startswith("/"):
        return await run_command(line, session, client)
    session.say(line)
    return Next.ANSWER


async def _answer(session: ChatSession, client: SlipstreamClient, show: Show) -> None:
    """Get and show one answer. Ctrl-C cancels it, on the server too; what has come by then stays in the chat."""
    stream = client.stream_complete(session.to_send(), **session.options)
    answering = asyncio.ensure_future(show(stream))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        turn = await answering
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise  # not the answer was cancelled, but the chat
        _note_interrupted(session, stream.text)
        return
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        await stream.aclose()
    session.answered(stream.text)
    session.turns.append(turn)
    terminal.out.print(Text(_summary(turn), "dim"))
    terminal.out.print()


def _note_interrupted(session: ChatSession, text: str) -> None:
    if text:
        session.answered(text)
        terminal.out.print(Text("⏹ interrupted; what has come stays in the chat", "yellow"))
    else:
        session.take_back()
        terminal.out.print(Text("⏹ interrupted before the answer began", "yellow"))


def _summary(turn: Turn) -> str:
    parts = [f"{turn.usage.completion_tokens} tokens"]
    if turn.tokens_per_s:
        parts.append(f"{turn.tokens_per_s:.1f} tokens/s")
    parts.append(f"first after {turn.first_s * 1000:.0f} ms")
    if turn.finish_reason == "length":
        parts.append("cut at max_new_tokens")
    return " · ".join(parts)


async def _read_script(session: ChatSession, client: SlipstreamClient) -> int:
    """Every line of stdin is one turn; the first one that fails ends it."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        if not line.strip():
            continue
        step = await _take(line.rstrip("\n"), session, client)
        if step is Next.LEAVE:
            break
        if step is Next.ANSWER:
            stream = client.stream_complete(session.to_send(), **session.options)
            session.turns.append(await chat_view.show_plain(stream))
            session.answered(stream.text)
    return 0
