"""The door to the server package, for the verbs that need it.

The base installation has no server, and then says what to install.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from slipstream_client.cli import terminal


def server(verb: str) -> ModuleType:
    """``slipstream_server.cli``; ends the command where it, or a package it needs, is missing."""
    try:
        return importlib.import_module("slipstream_server.cli")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        terminal.fail(
            f"`slipstream {verb}` needs the server, which is not installed (no module {missing!r}): "
            "pip install 'slipstream[worker]'"
        )


def module() -> ModuleType | None:
    """``slipstream_server.cli``, or None where it cannot be imported."""
    try:
        return importlib.import_module("slipstream_server.cli")
    except ModuleNotFoundError:
        return None
