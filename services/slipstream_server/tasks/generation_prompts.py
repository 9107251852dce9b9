"""Prompt and answer of the tasks that write text: prefixes, languages, special tokens, and what comes back.

No tokenizer is ever changed: where a language decides the special tokens they are set by hand, so that requests in any
languages share one. Pure functions over a tokenizer; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slipstream_server.errors import FieldViolation, InvalidField, PromptTooLong, UnsupportedField
from slipstream_server.models.tokenizer import TextTokenizer
from slipstream_server.tasks.generation_models import LanguageStyle, WritingModel
from slipstream_server.tasks.registry import NamedTask


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenPrompt:
    """What goes to the model, and the token that its answer must begin with (None: any)."""

    token_ids: tuple[int, ...]
    forced_first_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptShape:
    """How one call's inputs become prompts."""

    prefix: str = ""
    source: str = ""
    target: str = ""
    languages: LanguageStyle = LanguageStyle.NONE
    truncation: bool = False
    add_special_tokens: bool = True
    max_input_tokens: int | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    """The model's task_specific_params for the task."""


def shape_of(task: NamedTask, parameters: Mapping[str, Any], model: WritingModel) -> PromptShape:
    """The shape of a call's prompts. Raises InvalidField or UnsupportedField for languages that cannot be."""
    source, target = _languages(task, parameters, model)
    own = _own_params(task, model, source, target)
    prefix = parameters["prefix"]
    if prefix is None:
        prefix = own.get("prefix", model.prefix)
    return PromptShape(
        prefix=prefix if isinstance(prefix, str) else "",
        source=source,
        target=target,
        languages=model.languages if task.spec.id == "translation" else LanguageStyle.NONE,
        truncation=parameters["truncation"],
        add_special_tokens=parameters.get("add_special_tokens", True),
        max_input_tokens=model.max_input_tokens,
        own=own,
    )


def check_languages(shape: PromptShape, tokenizer: TextTokenizer) -> None:
    """Raise InvalidField where the model does not know a language of the shape."""
    if shape.languages is not LanguageStyle.NONE:
        _language_id(tokenizer, shape, shape.source, "src_lang")
        _language_id(tokenizer, shape, shape.target, "tgt_lang")


def write_prompt(text: str, shape: PromptShape, tokenizer: TextTokenizer, context_tokens: int) -> WrittenPrompt:
    """The prompt of one input. Raises InvalidField or PromptTooLong."""
    if shape.languages is not LanguageStyle.NONE:  # version 4 puts no prefix before texts of these models
        before, body, after = _with_language(text, shape, tokenizer)
        forced = _language_id(tokenizer, shape, shape.target, "tgt_lang")
    else:
        before, body, after = _parts(shape.prefix + text, tokenizer, shape.add_special_tokens)
        forced = None
    most = min(context_tokens, shape.max_input_tokens or context_tokens) if shape.truncation else context_tokens
    room = most - len(before) - len(after)
    if shape.truncation:
        body = body[: max(room, 0)]
    ids = (*before, *body, *after)
    if not ids:
        raise InvalidField.of("text", "the tokenizer makes no token of it")
    if len(body) > room:
        raise _too_long(len(ids), context_tokens)
    return WrittenPrompt(token_ids=ids, forced_first_token_id=forced)


def clean_up(text: str) -> str:
    """Without the spaces that older tokenizers leave before punctuation and contractions."""
    for spaced, plain in _SPACED:
        text = text.replace(spaced, plain)
    return text


_SPACED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _languages(task: NamedTask, parameters: Mapping[str, Any], model: WritingModel) -> tuple[str, str]:
    if task.spec.id != "translation":
        return "", ""
    source, target = parameters["src_lang"], parameters["tgt_lang"]
    if task.languages is not None and source is None and target is None:
        source, target = task.languages
    if model.languages is LanguageStyle.NONE:
        return source or "", target or ""
    if not target:
        raise InvalidField.of("parameters.tgt_lang", "is required: this model writes many languages")
    if not (source or model.source_language):
        raise InvalidField.of("parameters.src_lang", "is required: this model reads many languages")
    return source or model.source_language, target


def _own_params(task: NamedTask, model: WritingModel, source: str, target: str) -> Mapping[str, Any]:
    if task.spec.id != "translation":
        return model.task_params.get(task.spec.id, {})
    pairs = [name for name in model.task_params if name.startswith("translation")]
    if not pairs or model.languages is not LanguageStyle.NONE:
        return {}
    if not source and not target:
        return model.task_params[pairs[0]]
    wanted = f"translation_{source}_to_{target}"
    if wanted not in pairs:
        known = ", ".join(name.removeprefix("translation_") for name in pairs[:50])
        raise UnsupportedField.of("parameters.tgt_lang", f"this model was told of {known}; not of {wanted[12:92]}")
    return model.task_params[wanted]


def _with_language(text: str, shape: PromptShape, tokenizer: TextTokenizer) -> tuple[list[int], list[int], list[int]]:
    body = tokenizer.encode(text, add_special_tokens=False)
    language = _language_id(tokenizer, shape, shape.source, "src_lang")
    end = tokenizer.backend.token_to_id(tokenizer.special_tokens.get("eos_token", "</s>"))
    ends = [end] if end is not None else []
    if shape.languages is LanguageStyle.SUFFIX:
        return [], body, [*ends, language]
    return [language], body, ends


def _language_id(tokenizer: TextTokenizer, shape: PromptShape, language: str, parameter: str) -> int:
    token = f"__{language}__" if shape.languages is LanguageStyle.UNDERSCORED else language
    found: int | None = tokenizer.backend.token_to_id(token)
    if found is None or found not in tokenizer.special_ids:
        example = {LanguageStyle.UNDERSCORED: "en"}.get(shape.languages, "en_XX or eng_Latn")
        raise InvalidField.of(
            f"parameters.{parameter}",
            f"{language[:40]!r} is no language of this model, which spells them like {example}",
        )
    return found


def _parts(text: str, tokenizer: TextTokenizer, with_special: bool) -> tuple[list[int], list[int], list[int]]:
    """Special tokens before, tokens of the text, special tokens behind."""
    body = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text, add_special_tokens=True) if with_special else body
    num_before = next(
        (place for place in range(len(whole) - len(body) + 1) if whole[place : place + len(body)] == body), 0
    )
    return whole[:num_before], whole[num_before : num_before + len(body)], whole[num_before + len(body) :]


def _too_long(num_tokens: int, context_tokens: int) -> PromptTooLong:
    description = f"{num_tokens} tokens; the context holds {context_tokens}"
    return PromptTooLong(
        f"text: {description}",
        violations=[FieldViolation("text", description)],
        metadata={"prompt_tokens": str(num_tokens), "context_tokens": str(context_tokens)},
    )
