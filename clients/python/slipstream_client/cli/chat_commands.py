"""What a line that begins with a slash does in a chat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from rich.markup import escape

from slipstream_client.cli import terminal
from slipstream_client.cli.chat_session import SETTABLE, ChatSession
from slipstream_client.cli.model_rows import model_table
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import NotFoundError, SlipstreamClientError


class Next(Enum):
    """What the chat does after a command."""

    GO_ON = auto()
    ANSWER = auto()
    LEAVE = auto()


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its argument and meaning for /help, and what it does."""

    argument: str
    meaning: str
    run: Callable[[ChatSession, SlipstreamClient, str], Awaitable[Next]]


async def run_command(line: str, session: ChatSession, client: SlipstreamClient) -> Next:
    """Run ``/name argument``; failures are shown, and the chat goes on."""
    name, _, argument = line.strip().removeprefix("/").partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        terminal.warn(f"there is no /{name}; /help shows what there is")
        return Next.GO_ON
    try:
        return await command.run(session, client, argument.strip())
    except SlipstreamClientError as error:
        terminal.print_failure(error)
    except OSError as error:
        terminal.warn(f"{argument.strip()}: {error.strerror}")
    return Next.GO_ON


async def _help(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    rows = terminal.table("", "")
    rows.show_header = False
    for name, command in COMMANDS.items():
        rows.add_row(f"[bold]/{name}[/] [dim]{escape(command.argument)}[/]", command.meaning)
    terminal.plain_table(rows)
    terminal.note("Enter sends, Alt-Enter breaks the line, Ctrl-C stops an answer, Ctrl-D leaves")
    return Next.GO_ON


async def _system(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    if argument:
        session.system = "" if argument == "none" else argument
    terminal.note(f"system: {session.system or 'none'}")
    return Next.GO_ON


async def _reset(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    session.reset()
    terminal.note("a new chat; system message and options stay")
    return Next.GO_ON


async def _undo(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    said = session.take_back()
    terminal.note("there is nothing to undo" if said is None else f"taken back: {said}")
    return Next.GO_ON


async def _retry(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    said = session.take_back()
    if said is None:
        terminal.note("there is nothing to answer again")
        return Next.GO_ON
    session.say(said)
    return Next.ANSWER


def _file(argument: str) -> Path:
    return Path(argument or "chat.json").expanduser()


async def _save(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    path = _file(argument)
    session.save(path)
    terminal.note(f"{len(session.messages)} messages saved to {path}")
    return Next.GO_ON


async def _load(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    session.load(_file(argument))
    terminal.note(f"{len(session.messages)} messages loaded")
    return Next.GO_ON


async def _set(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    name, _, value = argument.partition(" ")
    if value:
        session.set(name, value.strip())
    elif name:
        terminal.warn(f"/set {name} needs a value; `default` unsets it")
        return Next.GO_ON
    shown = ", ".join(f"{key} {value}" for key, value in session.shown_options().items())
    terminal.note(f"set: {shown or 'nothing, the model decides'}")
    if not name:
        terminal.note(f"there are: {', '.join(SETTABLE)}")
    return Next.GO_ON


async def _model(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    if not argument:
        terminal.plain_table(model_table(await client.models.list(), session.default_model))
        return Next.GO_ON
    try:
        session.options["model"] = (await client.models.get(argument)).id
    except NotFoundError:
        raise
    except SlipstreamClientError:
        session.options["model"] = argument  # a service that does not tell of its models; the next turn will say
    await look_up_context(session, client)
    terminal.note(f"model: {session.model}")
    return Next.GO_ON


async def _adapter(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    if argument == "none":
        session.options.pop("adapter", None)
    elif argument:
        session.options["adapter"] = argument
    terminal.note(f"adapter: {session.adapter or 'none named, the model decides'}")
    return Next.GO_ON


async def _stats(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    total = session.total()
    lines = [f"answers: {len(session.turns)}, {total.prompt_tokens} tokens in, {total.completion_tokens} out"]
    if total.cached_prompt_tokens:
        lines.append(f"{total.cached_prompt_tokens} of the tokens in came from the cache")
    if session.turns:
        last = session.turns[-1]
        lines.append(f"last: {last.tokens_per_s:.1f} tokens/s, first text after {last.first_s * 1000:.0f} ms")
    if session.messages:
        count = await client.count_tokens(session.to_send(), model=session.options.get("model"))
        share = f" ({count.prompt_tokens / count.context_tokens:.0%})" if count.context_tokens else ""
        lines.append(f"this chat takes {count.prompt_tokens} of {count.context_tokens} tokens{share}")
    terminal.note("\n".join(lines))
    return Next.GO_ON


async def _exit(session: ChatSession, client: SlipstreamClient, argument: str) -> Next:
    return Next.LEAVE


async def look_up_context(session: ChatSession, client: SlipstreamClient) -> None:
    """Learn which model answers and how much it takes, where the inference service can be asked."""
    try:
        count = await client.count_tokens("x", model=session.options.get("model"), timeout_s=5)
    except SlipstreamClientError:
        return
    session.context_tokens = count.context_tokens
    if not session.options.get("model"):
        session.default_model = count.model


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", _help),
    "system": Command("TEXT", "show or set the instructions before the chat; `none` removes them", _system),
    "reset": Command("", "begin anew", _reset),
    "undo": Command("", "take the last message and its answer back", _undo),
    "retry": Command("", "answer the last message again", _retry),
    "save": Command("FILE", "write the chat to a file", _save),
    "load": Command("FILE", "go on with a saved chat", _load),
    "set": Command("NAME VALUE", "set an option, as `temperature 0.7`; `default` unsets it", _set),
    "model": Command("NAME", "list the models, or ask another one", _model),
    "adapter": Command("NAME", "answer with an adapter; `none` goes back", _adapter),
    "stats": Command("", "tokens, speed, and what of the context is taken", _stats),
    "exit": Command("", "leave", _exit),
}
