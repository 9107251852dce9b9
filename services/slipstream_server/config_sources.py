"""How settings are declared, and how a file, the environment and flags become typed values with a known source.

A section is a frozen dataclass whose fields are made by ``setting``. ``read_section`` takes the strongest source for
each field (flag, then environment, then file, then default), converts and checks it, and remembers where it came from.
Problems are collected, not raised one at a time. Knows no section by name; ``config.py`` does. Pure apart from the
mappings it is handed.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from slipstream_server.ranges import spelt_range

Section = TypeVar("Section")

_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


class ConfigError(ValueError):
    """The configuration cannot be used; ``problems`` are sentences that name the key, the value and what is allowed."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What a setting may be: a range (both ends included), or one of ``choices``."""

    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return spelt_range(self.minimum, self.maximum)

    def allow(self, value: object) -> bool:
        """Whether ``value`` lies within; None (unset) always does."""
        if self.choices:
            return value is None or value in self.choices
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            # NaN compares false with everything, and so is never within.
            low = self.minimum is None or value >= self.minimum
            high = self.maximum is None or value <= self.maximum
            return low and high and value == value
        return True


def setting(
    default: Any,
    about: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field of a section; ``about`` is its one-line documentation (``slipstream config check`` prints it)."""
    return dataclasses.field(
        default=default, metadata={"about": about, "bounds": Bounds(minimum, maximum, tuple(choices))}
    )


@dataclasses.dataclass(slots=True)
class Reading:
    """What has been found so far: the source of every key, and the problems."""

    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def read_section(
    section: str,
    cls: type[Section],
    *,
    file: Mapping[str, object],
    environment: Mapping[str, str],
    flags: Mapping[str, object],
    reading: Reading,
) -> Section:
    """The section from its three sources. ``environment`` holds this section's variables by field name.

    A field with a problem keeps its default, so that one pass finds all problems; the caller must look at
    ``reading.problems``.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for source in (file, flags):
        reading.problems += [_unknown(f"{section}.{key}", key, fields) for key in source if key not in fields]
    values: dict[str, object] = {}
    for name, field in fields.items():
        key = f"{section}.{name}"
        candidates = ((flags, "flag"), (environment, "environment"), (file, "file"))
        found = next(((given[name], source) for given, source in candidates if name in given), None)
        reading.sources[key] = found[1] if found else "default"
        if found is None:
            continue
        try:
            values[name] = _convert(found[0], hints[name], field.metadata["bounds"])
        except ValueError as error:
            reading.problems.append(f"{key} ({found[1]}): {error}")
    return cls(**values)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown(key: str, name: str, fields: Mapping[str, object]) -> str:
    return f"{key}: there is no such key{nearest(name, fields)}"


def _convert(raw: object, hint: Any, bounds: Bounds) -> object:
    value = _typed(raw, hint)
    if not all(bounds.allow(each) for each in (value if isinstance(value, tuple) else (value,))):
        raise ValueError(f"{raw!r} is not allowed; allowed: {bounds}")
    return value


def _typed(raw: object, hint: Any) -> object:
    """``raw`` (a TOML value, or the text of a variable or flag) as the type of the field."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return None if raw is None or raw == "" else _typed(raw, inner)
    if origin is tuple:
        items = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{raw!r} is no list")
        inner = typing.get_args(hint)[0]
        return tuple(_typed(item.strip() if isinstance(item, str) else item, inner) for item in items if item != "")
    return _scalar(raw, hint)


def _scalar(raw: object, hint: type) -> object:
    if hint is bool:
        return _boolean(raw)
    if hint is str and isinstance(raw, str):
        return raw
    if hint is Path and isinstance(raw, (str, Path)):
        return _path(raw)
    if hint in (int, float) and not isinstance(raw, bool):
        return _number(raw, hint)
    raise ValueError(f"{raw!r} is no {_NOUNS.get(hint, hint.__name__)}")


def _path(raw: str | Path) -> Path:
    try:
        return Path(raw).expanduser()
    except RuntimeError:
        raise ValueError(f"{str(raw)!r}: there is no home directory to expand ~ to") from None


def _number(raw: object, hint: type) -> object:
    if hint is int and isinstance(raw, float) and not raw.is_integer():
        raise ValueError(f"{raw!r} is no {_NOUNS[int]}")
    try:
        return hint(raw)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{raw!r} is no {_NOUNS[hint]}") from None


_NOUNS: Mapping[type, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


def _boolean(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = raw.strip().lower() if isinstance(raw, str) else ""
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError(f"{raw!r} is not true or false")
