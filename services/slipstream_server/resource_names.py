"""The names of resources: how they are spelled, checked, taken apart and put together.

    models/{model}                                  conversations/{conversation}/messages/{message}
    adapters/{adapter}/versions/{version}           trainingJobs/{job}/checkpoints/{step}
    adapters/{adapter}/aliases/{alias}              datasets/{dataset}

Short forms of adapters, wherever a request names one: ``support`` (which is ``support@live``), ``support@candidate``,
``support@v3``. A name is text from a stranger: it is matched whole against what is allowed, in ASCII, before anything
else looks at it. Pure functions; any thread.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from slipstream_server.errors import InvalidField

LIVE = "live"
"""The alias that a bare adapter name means."""

MAX_NAME_CHARS = 256
"""Every valid name is shorter; of a longer one no more than this is looked at."""

_ID = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_VERSION = re.compile(r"v[1-9][0-9]{0,8}", re.ASCII)
_LIKE_A_VERSION = re.compile(r"v[0-9]+", re.ASCII)
_STEP = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)

_ID_RULE = "1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
_SHOWN_CHARS = 80
_NEW_ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"


def check_id(value: str, field: str) -> str:
    """``value`` if it is a resource id; raises InvalidField for ``field`` otherwise."""
    if not _ID.fullmatch(value[:MAX_NAME_CHARS]):
        raise InvalidField.of(field, f"{_shown(value)} is no id: {_ID_RULE}")
    return value


def check_version(value: str, field: str) -> str:
    """``value`` if it is the id of an adapter version: v1, v2, ..."""
    if not _VERSION.fullmatch(value[:MAX_NAME_CHARS]):
        raise InvalidField.of(field, f"{_shown(value)} is no version: v1, v2, v3 and so on")
    return value


def check_alias(value: str, field: str) -> str:
    """``value`` if it is the id of an alias: an id that does not look like a version."""
    if _LIKE_A_VERSION.fullmatch(value[:MAX_NAME_CHARS]):
        raise InvalidField.of(
            field, f"{_shown(value)} looks like a version; an alias is {_ID_RULE}, but not v and digits alone"
        )
    return check_id(value, field)


def check_step(value: str, field: str) -> str:
    """``value`` if it is the id of a checkpoint: its optimizer step in decimal digits."""
    if not _STEP.fullmatch(value[:MAX_NAME_CHARS]):
        raise InvalidField.of(
            field, f"{_shown(value)} is no checkpoint: the whole number of its step, without leading zeros"
        )
    return value


def new_id(prefix: str = "") -> str:
    """A fresh random id of 75 bits, after ``prefix`` and a dash where one is given."""
    random_part = "".join(secrets.choice(_NEW_ID_ALPHABET) for _ in range(15))
    return check_id(f"{prefix}-{random_part}" if prefix else random_part, "id")


@dataclass(frozen=True, slots=True)
class ModelName:
    model: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "models/{model}"))

    def __str__(self) -> str:
        return f"models/{self.model}"


@dataclass(frozen=True, slots=True)
class AdapterName:
    adapter: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "adapters/{adapter}"))

    def __str__(self) -> str:
        return f"adapters/{self.adapter}"


@dataclass(frozen=True, slots=True)
class AdapterVersionName:
    adapter: str
    version: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "adapters/{adapter}/versions/{version}"))

    def __str__(self) -> str:
        return f"adapters/{self.adapter}/versions/{self.version}"


@dataclass(frozen=True, slots=True)
class AdapterAliasName:
    adapter: str
    alias: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "adapters/{adapter}/aliases/{alias}"))

    def __str__(self) -> str:
        return f"adapters/{self.adapter}/aliases/{self.alias}"


@dataclass(frozen=True, slots=True)
class ConversationName:
    conversation: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "conversations/{conversation}"))

    def __str__(self) -> str:
        return f"conversations/{self.conversation}"


@dataclass(frozen=True, slots=True)
class MessageName:
    conversation: str
    message: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "conversations/{conversation}/messages/{message}"))

    def __str__(self) -> str:
        return f"conversations/{self.conversation}/messages/{self.message}"


@dataclass(frozen=True, slots=True)
class TrainingJobName:
    job: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "trainingJobs/{job}"))

    def __str__(self) -> str:
        return f"trainingJobs/{self.job}"


@dataclass(frozen=True, slots=True)
class CheckpointName:
    job: str
    step: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "trainingJobs/{job}/checkpoints/{step}"))

    def __str__(self) -> str:
        return f"trainingJobs/{self.job}/checkpoints/{self.step}"


@dataclass(frozen=True, slots=True)
class DatasetName:
    dataset: str

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        return cls(*_take_apart(text, field, "datasets/{dataset}"))

    def __str__(self) -> str:
        return f"datasets/{self.dataset}"


def parse_adapter_reference(text: str, field: str) -> AdapterVersionName | AdapterAliasName:
    """What a request means by ``text``: a version or an alias, by its full name or a short form.

    ``support``, ``support@candidate``, ``support@v3``, ``adapters/support``, ``adapters/support/versions/v3``,
    ``adapters/support/aliases/candidate``; a bare adapter is its ``live``. Raises InvalidField for anything else.
    """
    if "/" in text[:MAX_NAME_CHARS]:
        return _parse_full_reference(text, field)
    adapter, at, selector = text[: MAX_NAME_CHARS + 1].partition("@")
    check_id(adapter, field)
    if not at:
        return AdapterAliasName(adapter, LIVE)
    if _LIKE_A_VERSION.fullmatch(selector):
        return AdapterVersionName(adapter, check_version(selector, field))
    return AdapterAliasName(adapter, check_alias(selector, field))


def _parse_full_reference(text: str, field: str) -> AdapterVersionName | AdapterAliasName:
    collection = text[:MAX_NAME_CHARS].split("/")[2:3]
    if collection == ["versions"]:
        return AdapterVersionName.parse(text, field)
    if collection == ["aliases"]:
        return AdapterAliasName.parse(text, field)
    return AdapterAliasName(AdapterName.parse(text, field).adapter, LIVE)


_CHECKS: dict[str, Callable[[str, str], str]] = {
    "{version}": check_version,
    "{alias}": check_alias,
    "{step}": check_step,
}


def _take_apart(text: str, field: str, form: str) -> tuple[str, ...]:
    """The checked ids in ``text``, which must have the ``form``: fixed segments, and ids in braces."""
    segments, expected = text[: MAX_NAME_CHARS + 1].split("/"), form.split("/")
    if len(text) > MAX_NAME_CHARS or len(segments) != len(expected) or segments[0::2] != expected[0::2]:
        raise InvalidField.of(field, f"{_shown(text)} is not of the form {form}")
    ids = zip(segments[1::2], expected[1::2], strict=True)
    return tuple(_CHECKS.get(place, check_id)(value, field) for value, place in ids)


def _shown(value: str) -> str:
    """``value`` as a message may hold it: ASCII, escaped, cut short."""
    return ascii(value[:_SHOWN_CHARS]) + ("..." if len(value) > _SHOWN_CHARS else "")
