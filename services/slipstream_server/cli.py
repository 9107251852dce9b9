"""What the command line needs of the server: run one service, read the configuration, fetch models.

``python -m slipstream_server.cli SERVICE [FLAGS]`` is the same as ``slipstream serve SERVICE [FLAGS]``. Every setting
of ``config.describe`` is a flag; nothing here knows one by name. Services are composed by
``slipstream_server.rpc.<service>.app.run(settings)``, plain or a coroutine, which returns the exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub

from slipstream_server.config import (
    AdaptersConfig,
    ChatConfig,
    ConfigError,
    InferenceConfig,
    Settings,
    TrainingConfig,
    describe,
    load_settings,
)
from slipstream_server.config_sources import Bounds
from slipstream_server.errors import SlipstreamError
from slipstream_server.logs import configure_logging
from slipstream_server.models.hub import HubAccess

# Re-exported for the command line, which may import nothing else of the server.
from slipstream_server.models.pull import ModelRow, list_models, pull

__all__ = [
    "SERVICES",
    "ConfigError",
    "ModelRow",
    "SlipstreamError",
    "check_config",
    "flags_from",
    "hub",
    "is_built",
    "list_models",
    "load",
    "pull",
    "serve",
]

SERVICES: Mapping[str, type[Any]] = {
    "inference": InferenceConfig,
    "chat": ChatConfig,
    "training": TrainingConfig,
    "adapters": AdaptersConfig,
}
EXIT_USAGE = 2
_PR_SET_PDEATHSIG = 1
# Everyday names for settings that hold a list.
_ALIASES = {"inference.models": "--model"}


def main() -> NoReturn:
    """``python -m slipstream_server.cli SERVICE [FLAGS]``."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.stderr.write(f"usage: {Path(sys.argv[0]).name} {{{','.join(SERVICES)}}} [FLAGS]\n")
        sys.exit(EXIT_USAGE)
    sys.exit(serve(sys.argv[1], sys.argv[2:]))


def serve(service: str, argv: Sequence[str]) -> int:
    """Run ``service`` in the foreground until SIGTERM or SIGINT; the process's exit code."""
    if service not in SERVICES:
        return _refuse([f"service: {service!r} is not one of {', '.join(SERVICES)}"])
    if not is_built(service):
        return _refuse([f"service: {service!r} is not part of this installation"])
    arguments = _parser(service).parse_args(argv)
    if arguments.exit_with_parent:
        _exit_with_parent(arguments.exit_with_parent)
    try:
        settings = load_settings(file=arguments.config, environment=os.environ, flags=_flags(arguments))
    except ConfigError as error:
        return _refuse(error.problems)
    configure_logging(level=settings.common.log_level, log_format=settings.common.log_format)  # type: ignore[arg-type]
    return _run(service, settings)


def _run(service: str, settings: Settings) -> int:
    app = importlib.import_module(f"slipstream_server.rpc.{service}.app")
    try:
        exit_code: int = asyncio.run(app.run(settings))
        return exit_code
    except ConfigError as error:
        return _refuse(error.problems)
    except SlipstreamError as error:
        sys.stderr.write(f"error: {error.message} (reason {error.reason})\n")
        return 1


def is_built(service: str) -> bool:
    """Whether this installation can run ``service``."""
    try:
        return importlib.util.find_spec(f"slipstream_server.rpc.{service}.app") is not None
    except ModuleNotFoundError:
        return False


def load(file: Path | None, flags: Mapping[str, object]) -> Settings:
    """The settings of this machine, by flags, environment and file; raises ``ConfigError``."""
    return load_settings(file=file, environment=os.environ, flags=flags)


def flags_from(assignments: Sequence[str]) -> dict[str, object]:
    """``SECTION.KEY=VALUE`` texts as flags; a key that comes more than once is a list. Raises ``ConfigError``."""
    found: dict[str, list[str]] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or "." not in key:
            raise ConfigError([f"--set: {assignment!r} is not SECTION.KEY=VALUE"])
        found.setdefault(key, []).append(value)
    return {key: values[0] if len(values) == 1 else tuple(values) for key, values in found.items()}


def hub() -> tuple[str, bool]:
    """The address of the model hub that would be asked, and whether it must not be."""
    access = HubAccess.from_environment()
    return access.endpoint or huggingface_hub.constants.ENDPOINT, access.is_offline


def check_config(file: Path | None, flags: Mapping[str, object] | None = None) -> list[tuple[str, str, str, str, str]]:
    """Every setting as (key, value, where it came from, what is allowed, what it is); raises ``ConfigError``."""
    settings = load(file, flags or {})
    return [
        (key, _shown(settings, key), settings.sources[key], str(bounds), about)
        for key, about, _default, bounds in describe()
    ]


def _shown(settings: Settings, key: str) -> str:
    section, _, name = key.partition(".")
    value = getattr(getattr(settings, section), name)
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the flags fill a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {message} ({self.prog} --help)\n")


def _parser(service: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"slipstream serve {service}", description=SERVICES[service].__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="slipstream.toml to read")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any setting, of other services too"
    )
    parser.add_argument("--exit-with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in (service, "common")}
    for key, about, default, bounds in describe():
        section = key.partition(".")[0]
        if section in groups:
            _add_flag(groups[section], key, about, default, bounds)
    return parser


def _add_flag(group: Any, key: str, about: str, default: object, bounds: Bounds) -> None:
    name = key.partition(".")[2]
    flags = [f"--{name.replace('_', '-')}", *([_ALIASES[key]] if key in _ALIASES else [])]
    allowed = "" if bounds == Bounds() else f"; {bounds}"
    shown = "" if default in (None, (), "") else f" (default {default})"
    # argparse reads % in a help text as a format.
    text = f"{about}{allowed}{shown}".replace("%", "%%")
    if isinstance(default, bool):
        group.add_argument(flags[0], dest=key, nargs="?", const="true", metavar="true|false", help=text)
    elif isinstance(default, tuple):
        group.add_argument(*flags, dest=key, action="append", metavar=name.upper().rstrip("S"), help=text)
    else:
        group.add_argument(*flags, dest=key, metavar=name.upper(), help=text)


def _flags(arguments: argparse.Namespace) -> dict[str, object]:
    given = {key: value for key, value in vars(arguments).items() if "." in key and value is not None}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return flags_from(arguments.set) | own


def _refuse(problems: Sequence[str]) -> int:
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return EXIT_USAGE


def _exit_with_parent(parent_pid: int) -> None:
    """End this process when its parent does, even by SIGKILL, so that no orphan keeps the port.

    Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:  # it died before the line above
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
