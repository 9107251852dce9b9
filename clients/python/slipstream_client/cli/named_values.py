"""NAME=VALUE on the command line, the value as JSON where it is some, else as text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer


def named_values(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """The values by name; of two under one name the last. Wrong usage of ``option`` where one has no name."""
    return dict(_pair(pair, option) for pair in pairs)


def _pair(pair: str, option: str) -> tuple[str, Any]:
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint=option)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
