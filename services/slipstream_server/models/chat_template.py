"""Chat templates: messages to the text a model was trained on, as transformers' apply_chat_template renders them.

Blocks for at most ``RenderLimits.seconds``; called on threads. Knows nothing of token ids or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from slipstream_server.errors import InvalidField, ModelLoadFailed
from slipstream_server.models.folder import read_json_if_present
from slipstream_server.models.template_sandbox import (
    RenderLimits,
    TemplateEnvironment,
    TemplateLimitExceeded,
    TemplateRefused,
)

MAX_TEMPLATE_BYTES = 1024 * 1024
RESERVED_PARAMETERS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """The template (or templates) of one model, compiled."""

    def __init__(self, sources: Mapping[str, str], limits: RenderLimits | None = None) -> None:
        self._environment = TemplateEnvironment(limits or RenderLimits())
        try:
            self._templates = {name: self._environment.from_string(source) for name, source in sources.items()}
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadFailed(f"the chat template does not compile: {str(error)[:200]}") from error
        self._sources = dict(sources)

    @classmethod
    def load(cls, folder: Path, limits: RenderLimits | None = None) -> ChatTemplate | None:
        """The chat template of a prepared model folder; None where it has none."""
        sources = _template_sources(folder)
        return cls(sources, limits) if sources else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        special_tokens: Mapping[str, str],
        parameters: Mapping[str, Any],
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The rendered chat, ending in a generation prompt, or in the last message's text where that is to be
        continued, or whole without either.

        Raises InvalidField when the template refuses the messages, fails on them, or runs over its bounds.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidField.of("chat", f"the model has only templates named {', '.join(sorted(self._templates))}")
        copies = [dict(message) for message in messages]
        if continue_final_message:
            copies[-1]["content"] = copies[-1].get("content", "") + _CONTINUE_MARK
        variables = {
            **special_tokens,
            **parameters,
            "messages": copies,
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        rendered = self._run(name, variables)
        if continue_final_message:
            return _cut_at_mark(rendered, str(messages[-1].get("content", "")))
        return rendered

    def _run(self, name: str, variables: Mapping[str, Any]) -> str:
        try:
            return self._environment.run(self._templates[name], variables)
        except TemplateRefused as error:
            raise InvalidField.of("chat.messages", f"the model's template refuses them: {str(error)[:500]}") from error
        except TemplateLimitExceeded as error:
            raise InvalidField.of("chat", f"the model's template ran over its bounds: {error}") from error
        except Exception as error:  # templates raise whatever Python raises on their operations
            text = f"the model's template fails on them: {type(error).__name__}: {str(error)[:200]}"
            raise InvalidField.of("chat.messages", text) from error


def _cut_at_mark(rendered: str, final: str) -> str:
    mark = _CONTINUE_MARK.strip()
    if mark not in rendered or final.strip() not in rendered:
        raise InvalidField.of(
            "chat.continue_final_message", "the model's template leaves parts of the last message out"
        )
    position = rendered.rindex(mark)
    kept = rendered[:position]
    # A template that trims messages has eaten the mark's own trailing space; the text before it is trimmed alike.
    return kept if rendered.startswith(_CONTINUE_MARK, position) else kept.rstrip()


def _template_sources(folder: Path) -> dict[str, str]:
    sources: dict[str, str] = {}
    config = read_json_if_present(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(config, str):
        sources["default"] = config
    elif isinstance(config, list):
        sources |= {str(item["name"]): str(item["template"]) for item in config if isinstance(item, dict)}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            if path.stat().st_size > MAX_TEMPLATE_BYTES:
                raise ModelLoadFailed(f"{path.name}: longer than {MAX_TEMPLATE_BYTES} bytes")
            sources[name] = path.read_text(encoding="utf-8")
    return sources
