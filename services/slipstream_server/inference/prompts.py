"""From a caller's prompt to token ids: validates text, renders chats, tokenizes on threads of its own.

Runs on the event loop; the work itself is done by a small pool of threads, since a long text takes seconds and
``tokenizers`` releases the GIL. Knows nothing of queues or workers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slipstream_server.errors import FieldViolation, InvalidField, PromptTooLong, WrongState
from slipstream_server.inference.calls import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from slipstream_server.inference.detokenizer import DetokenizerFactory
from slipstream_server.models.chat_template import RESERVED_PARAMETERS, ChatTemplate
from slipstream_server.models.tokenizer import SPECIAL_TOKEN_NAMES, TextTokenizer, TokenSpan
from slipstream_server.tasks.generation_prompts import PromptShape, WrittenPrompt, write_prompt

MAX_TEXT_BYTES = 1024 * 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_DETOKENIZE_TOKENS = 1024 * 1024
ROLES = ("system", "user", "assistant", "tool")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the worker wants it, and the text to echo (empty where not asked for)."""

    token_ids: tuple[int, ...]
    text: str = ""


class PromptEncoder:
    """Tokenizer and chat template of one model, on a shared pool of threads."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None, threads: ThreadPoolExecutor) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.detokenizers = DetokenizerFactory(tokenizer)
        self._threads = threads

    @classmethod
    async def load(cls, folder: Path, threads: ThreadPoolExecutor) -> PromptEncoder:
        """Read a prepared model folder; raises ModelLoadFailed."""

        def read() -> PromptEncoder:
            return cls(TextTokenizer.load(folder), ChatTemplate.load(folder), threads)

        return await asyncio.get_running_loop().run_in_executor(threads, read)

    async def encode(
        self, prompt: Prompt, *, vocab_size: int, context_tokens: int | None, with_text: bool = False
    ) -> EncodedPrompt:
        """Raises InvalidField, WrongState (no chat template) or PromptTooLong (not worth tokenizing)."""
        match prompt:
            case TokenPrompt():
                check_token_ids(prompt.token_ids, vocab_size, "token_ids.ids")
                return await self._run(self._echo_tokens, prompt.token_ids, with_text)
            case TextPrompt():
                check_text(prompt.text, "text")
                self._check_length(prompt.text, context_tokens, "text")
                return await self._run(self._encode_text, prompt.text, prompt.add_special_tokens, with_text)
            case ChatPrompt():
                return await self._run(self._encode_chat, prompt, context_tokens, with_text)

    async def write(self, text: str, shape: PromptShape, context_tokens: int) -> WrittenPrompt:
        """The prompt of a task's input; raises InvalidField or PromptTooLong."""
        check_text(text, "text")
        if not shape.truncation:
            self._check_length(text, context_tokens, "text")
        return await self._run(write_prompt, text, shape, self.tokenizer, context_tokens)

    async def spans(self, text: str, *, add_special_tokens: bool) -> list[TokenSpan]:
        check_text(text, "text")
        return await self._run(lambda: self.tokenizer.encode_spans(text, add_special_tokens=add_special_tokens))

    async def decode(self, token_ids: Sequence[int], *, vocab_size: int, skip_special_tokens: bool) -> str:
        if len(token_ids) > MAX_DETOKENIZE_TOKENS:
            raise InvalidField.of("token_ids", f"{len(token_ids)} tokens; at most {MAX_DETOKENIZE_TOKENS}")
        check_token_ids(token_ids, vocab_size, "token_ids")
        return await self._run(lambda: self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _echo_tokens(self, token_ids: tuple[int, ...], with_text: bool) -> EncodedPrompt:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False) if with_text else ""
        return EncodedPrompt(token_ids=token_ids, text=text)

    def _encode_text(self, text: str, add_special_tokens: bool, with_text: bool) -> EncodedPrompt:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        if not ids:
            raise InvalidField.of("text", "the tokenizer makes no token of it")
        return EncodedPrompt(token_ids=ids, text=text if with_text else "")

    def _encode_chat(self, chat: ChatPrompt, context_tokens: int | None, with_text: bool) -> EncodedPrompt:
        template = self._check_chat(chat)
        rendered = template.render(
            [template_message(message) for message in chat.messages],
            tools=chat.tools,
            special_tokens=self.tokenizer.special_tokens,
            parameters=chat.template_parameters,
            continue_final_message=chat.continue_final_message,
        )
        self._check_length(rendered, context_tokens, "chat.messages")
        return self._encode_text(rendered, False, with_text)

    def _check_chat(self, chat: ChatPrompt) -> ChatTemplate:
        if self.template is None:
            raise WrongState("chat: the model has no chat template", metadata={"state": "NO_CHAT_TEMPLATE"})
        check_messages(chat.messages, chat.continue_final_message)
        if len(chat.tools) > MAX_TOOLS:
            raise InvalidField.of("chat.tools", f"{len(chat.tools)} tools; at most {MAX_TOOLS}")
        for name in chat.template_parameters:
            if name in RESERVED_PARAMETERS or name in SPECIAL_TOKEN_NAMES:
                raise InvalidField.of(
                    f"chat.template_parameters.{name}", "belongs to the template and cannot be replaced"
                )
        _check_json("chat.tools", list(chat.tools))
        _check_json("chat.template_parameters", dict(chat.template_parameters))
        return self.template

    def _check_length(self, text: str, context_tokens: int | None, field: str) -> None:
        """A text too long for the context even if it were made of the longest tokens is not worth tokenizing."""
        if context_tokens is not None and len(text) > (context_tokens + 1) * self.tokenizer.max_token_chars:
            description = f"{len(text)} characters; a context of {context_tokens} tokens cannot hold as many"
            raise PromptTooLong(
                f"{field}: {description}",
                violations=[FieldViolation(field, description)],
                metadata={"prompt_characters": str(len(text)), "context_tokens": str(context_tokens)},
            )


def template_message(message: ChatMessage) -> dict[str, Any]:
    """A message in the words of chat templates: what is not set is left out, as templates test for presence."""
    optional: Mapping[str, Any] = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [dict(call) for call in message.tool_calls] or None,
    }
    return {"role": message.role, "content": message.content, **{k: v for k, v in optional.items() if v is not None}}


def check_text(text: str, field: str) -> None:
    """Raise InvalidField for a text that is empty, too long, or cannot be tokenized."""
    if not text:
        raise InvalidField.of(field, "is empty; at least one character")
    if len(text) > MAX_TEXT_BYTES:
        raise InvalidField.of(field, f"{len(text)} characters; at most {MAX_TEXT_BYTES} bytes")
    check_characters(text, field)


def check_characters(text: str, field: str) -> None:
    """Raise InvalidField for NUL, lone surrogates, and more than 1 MiB of UTF-8."""
    if (place := text.find("\0")) >= 0:
        raise InvalidField.of(field, f"holds NUL at character {place}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidField.of(field, f"holds a lone surrogate at character {error.start}") from error
    if size > MAX_TEXT_BYTES:
        raise InvalidField.of(field, f"{size} bytes of UTF-8; at most {MAX_TEXT_BYTES}")


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    if not token_ids:
        raise InvalidField.of(field, "is empty; at least one token")
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    for place, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidField.of(f"{field}[{place}]", f"{token_id} is not in the vocabulary (0 to {vocab_size - 1})")


def check_messages(messages: Sequence[ChatMessage], continue_final_message: bool) -> None:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidField.of("chat.messages", f"{len(messages)} messages; 1 to {MAX_MESSAGES}")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidField.of(f"chat.messages[{place}].role", f"{message.role[:40]!r}; one of {', '.join(ROLES)}")
        check_characters(message.content, f"chat.messages[{place}].content")
        check_characters(message.name or "", f"chat.messages[{place}].name")
        _check_json(f"chat.messages[{place}].tool_calls", [dict(call) for call in message.tool_calls])
    if continue_final_message and messages[-1].role != "assistant":
        raise InvalidField.of(
            "chat.continue_final_message", f"the last message is of role {messages[-1].role}, not assistant"
        )


def _check_json(field: str, value: object) -> None:
    """Templates print these with ``tojson``: they must be JSON, and as clean and short as any text."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidField.of(field, "is not plain JSON") from error
    if "\\u0000" in text:
        raise InvalidField.of(field, "holds NUL")
    check_characters(text, field)
