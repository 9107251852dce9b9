"""What the tasks that write text must know of a model beyond its facts: how it was told to do them.

Read from the JSON files of a prepared folder alone; Transformers 5 no longer looks at most of it. Torch-free; reading
blocks on the disk for milliseconds; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from slipstream_server.models.facts import Family, ModelFacts
from slipstream_server.models.folder import read_json_if_present

_TRANSFORMERS_DEFAULT_MAX_LENGTH = 20
_MAX_MODEL_LENGTH = 1 << 24


class LanguageStyle(StrEnum):
    """Where a multilingual model wants the language of the input among its tokens, and how it is spelled."""

    NONE = "none"
    PREFIX = "prefix"
    """[language] text [end]: mBART-50, NLLB."""
    SUFFIX = "suffix"
    """text [end] [language]: mBART, NLLB of old."""
    UNDERSCORED = "underscored"
    """[__language__] text [end]: M2M100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingModel:
    """A model that writes text. ``task_params`` is task_specific_params of its configuration, by task.

    ``max_length`` is what its generation_config says, where it says something of its own. ``max_input_tokens`` is what
    its tokenizer cuts to.
    """

    is_encoder_decoder: bool
    prefix: str = ""
    task_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_length: int | None = None
    max_input_tokens: int | None = None
    languages: LanguageStyle = LanguageStyle.NONE
    source_language: str = ""

    @classmethod
    def read(cls, folder: Path, facts: ModelFacts) -> WritingModel:
        """From a prepared folder; raises CorruptArtifact where its files are no JSON objects."""
        config = read_json_if_present(folder / "config.json")
        tokenizer = read_json_if_present(folder / "tokenizer_config.json")
        return cls(
            is_encoder_decoder=facts.family is Family.ENCODER_DECODER,
            prefix=_text(config.get("prefix")),
            task_params=_task_params(config.get("task_specific_params")),
            max_length=_own_max_length(facts),
            max_input_tokens=_max_input_tokens(tokenizer.get("model_max_length")),
            languages=_language_style(facts.model_type, tokenizer),
            source_language=_text(tokenizer.get("src_lang")),
        )

    @property
    def num_start_tokens(self) -> int:
        """What version 4's lengths count beside the new tokens, where that is always the same."""
        return 1 if self.is_encoder_decoder else 0


def _text(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= 4096 else ""


def _task_params(value: object) -> dict[str, Mapping[str, Any]]:
    items = value.items() if isinstance(value, dict) else ()
    return {str(task): params for task, params in items if isinstance(params, dict)}


def _own_max_length(facts: ModelFacts) -> int | None:
    length = facts.generation.max_length
    return None if length == _TRANSFORMERS_DEFAULT_MAX_LENGTH else length


def _max_input_tokens(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < _MAX_MODEL_LENGTH else None


def _language_style(model_type: str, tokenizer: Mapping[str, Any]) -> LanguageStyle:
    name = str(tokenizer.get("tokenizer_class", ""))
    if model_type == "mbart":
        return LanguageStyle.PREFIX if "50" in name else LanguageStyle.SUFFIX
    if model_type != "m2m_100" and not name.startswith("Nllb"):
        return LanguageStyle.NONE
    if not name.startswith("Nllb"):
        return LanguageStyle.UNDERSCORED
    return LanguageStyle.SUFFIX if tokenizer.get("legacy_behaviour") else LanguageStyle.PREFIX
