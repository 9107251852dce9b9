"""The line at which a person types: history, several lines, completion of commands, and what is going on below."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from slipstream_client.cli.chat_commands import COMMANDS
from slipstream_client.cli.chat_session import SETTABLE, ChatSession

STYLE = Style.from_dict(
    {"prompt": "ansicyan bold", "bottom-toolbar": "noreverse ansibrightblack", "placeholder": "ansibrightblack"}
)


class ChatPrompt:
    """Reads what is said to ``session``."""

    def __init__(self, session: ChatSession, history_file: Path) -> None:
        self._chat = session
        self._prompt: PromptSession[str] = PromptSession(
            history=FileHistory(str(history_file)),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "  ",
            key_bindings=_keys(),
            completer=_Commands(),
            complete_while_typing=True,
            bottom_toolbar=self._toolbar,
            placeholder=FormattedText([("class:placeholder", "say something, or /help")]),
            style=STYLE,
            reserve_space_for_menu=4,
        )

    async def read(self) -> str | None:
        """What was typed; None when the person leaves. Ctrl-C throws the line away."""
        while True:
            try:
                return await self._prompt.prompt_async(FormattedText([("class:prompt", "› ")]))
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None

    def _toolbar(self) -> FormattedText:
        chat = self._chat
        parts = [chat.model or "default model"]
        if chat.adapter:
            parts.append(chat.adapter)
        parts += [f"{name} {value}" for name, value in chat.shown_options().items()]
        if chat.turns:
            last = chat.turns[-1]
            taken = last.usage.prompt_tokens + last.usage.completion_tokens
            parts.append(f"{taken}/{chat.context_tokens} tokens" if chat.context_tokens else f"{taken} tokens")
            parts.append(f"{last.tokens_per_s:.1f} tokens/s")
        return FormattedText([("", " " + " · ".join(parts))])


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _Commands(Completer):
    """Completes commands, and the names of options after /set."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            for command, facts in COMMANDS.items():
                if command.startswith(name[1:]):
                    yield Completion(f"/{command}", start_position=-len(name), display_meta=facts.meaning)
        elif name == "/set" and " " not in argument:
            for option in SETTABLE:
                if option.startswith(argument):
                    yield Completion(option, start_position=-len(argument))
