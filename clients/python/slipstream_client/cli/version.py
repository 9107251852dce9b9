"""``slipstream version``."""

from __future__ import annotations

from importlib import metadata

from slipstream_client.cli import terminal

DISTRIBUTION = "slipstream"


def installed_version(distribution: str) -> str:
    """The version of an installed distribution; empty where it is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def version(as_json: terminal.JsonFlag = False) -> None:
    """Print the version."""
    number = installed_version(DISTRIBUTION) or "not installed as a package"
    if as_json:
        terminal.print_json({"version": number})
    else:
        terminal.out.print(f"slipstream {number}")
