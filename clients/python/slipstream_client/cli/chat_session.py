"""The state of one chat: its messages, who answers and how, and what it has cost. No terminal, no network."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slipstream_client.errors import InvalidRequestError
from slipstream_client.options import SamplingOptions, StoppingOptions
from slipstream_client.requests import complete_request
from slipstream_client.results import ChatMessage, Usage

SETTABLE = (*SamplingOptions.__annotations__, *StoppingOptions.__annotations__, "priority")
MAX_FILE_BYTES = 64 * 1024 * 1024
FORMAT = "slipstream-chat-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one answer cost. ``first_s``: until its first text; ``decode_s``: from there to its end."""

    usage: Usage
    first_s: float
    decode_s: float
    finish_reason: str
    model: str
    adapter_version: str

    @property
    def tokens_per_s(self) -> float:
        """The speed of decoding; the first token belongs to the prompt's part. 0 where there is none to measure."""
        return max(0, self.usage.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(slots=True)
class ChatSession:
    """A conversation as the person at the terminal sees it."""

    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    messages: list[ChatMessage] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    context_tokens: int = 0
    default_model: str = ""

    @property
    def model(self) -> str:
        """The model that was chosen, else the service's default as far as it is known."""
        return str(self.options.get("model") or self.default_model).removeprefix("models/")

    @property
    def adapter(self) -> str:
        return str(self.options.get("adapter") or "")

    def to_send(self) -> list[ChatMessage]:
        """What goes to the model."""
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        return [*system, *self.messages]

    def say(self, text: str) -> None:
        """The person says something."""
        self.messages.append(ChatMessage(role="user", content=text))

    def answered(self, text: str) -> None:
        """The model has answered, perhaps only in part."""
        self.messages.append(ChatMessage(role="assistant", content=text))

    def take_back(self) -> str | None:
        """Forget the last thing said and its answer; what was said, None where there is nothing."""
        while self.messages:
            message = self.messages.pop()
            if message.role == "user":
                return message.content
        return None

    def reset(self) -> None:
        """Begin anew, with the same system message and options."""
        self.messages.clear()
        self.turns.clear()

    def set(self, name: str, text: str) -> None:
        """Set an option from text; `default` unsets it. Raises InvalidRequestError naming what is wrong."""
        if name not in SETTABLE:
            raise InvalidRequestError.of(name, f"no such option; there are {', '.join(SETTABLE)}")
        if text in ("default", "none", "unset"):
            self.options.pop(name, None)
            return
        value = _value(text)
        candidate = self.options | {name: value}
        complete_request([ChatMessage(role="user", content="x")], candidate, call="set")  # refuses what cannot be sent
        self.options = candidate

    def shown_options(self) -> dict[str, Any]:
        """The options that are set, but for model and adapter."""
        return {name: value for name, value in self.options.items() if name not in ("model", "adapter", "timeout_s")}

    def save(self, path: Path) -> None:
        """Write the chat to a JSON file. Raises OSError."""
        chat = {
            "format": FORMAT,
            "system": self.system,
            "options": self.options,
            "messages": [{"role": message.role, "content": message.content} for message in self.messages],
        }
        path.write_text(json.dumps(chat, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take over a chat that ``save`` wrote. Raises OSError, or InvalidRequestError where it is something else."""
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequestError.of("file", f"{path.name!r} is larger than {MAX_FILE_BYTES} bytes")
        try:
            chat = json.loads(path.read_text(encoding="utf-8"))
            if chat["format"] != FORMAT:
                raise ValueError
            messages = [ChatMessage(role=str(m["role"]), content=str(m["content"])) for m in chat["messages"]]
            options, system = dict(chat["options"]), str(chat["system"])
            complete_request(messages, options, call="load")
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequestError.of("file", f"{path.name!r} is no saved chat") from error
        self.messages, self.options, self.system = messages, options, system
        self.turns.clear()

    def total(self) -> Usage:
        """What all turns cost together."""
        names = [f.name for f in dataclasses.fields(Usage)]
        return Usage(**{name: sum(getattr(turn.usage, name) for turn in self.turns) for name in names})


def _value(text: str) -> Any:
    """Numbers, true, false and JSON lists as themselves, anything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
