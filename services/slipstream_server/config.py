"""All settings, composed once at start from flags, environment, file and defaults, in that order of strength.

``slipstream.toml`` has a table per section (``config_sections``); the variable of a key is
``SLIPSTREAM_<SECTION>_<KEY>`` (``SLIPSTREAM_<KEY>`` for ``common``). Every value is checked here, against its range and
against the others; the rooms get plain values and never read a file or a variable for their settings.
``Settings.sources`` knows where each value came from. Reads files; runs before any loop.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from slipstream_server.config_sections import (
    AdaptersConfig,
    ChatConfig,
    CommonConfig,
    InferenceConfig,
    ServiceConfig,
    TrainingConfig,
)
from slipstream_server.config_sources import Bounds, ConfigError, Reading, nearest, read_section

__all__ = [
    "AdaptersConfig",
    "ChatConfig",
    "CommonConfig",
    "ConfigError",
    "InferenceConfig",
    "ListenConfig",
    "ServiceName",
    "Settings",
    "TrainingConfig",
    "describe",
    "load_settings",
]

ServiceName = Literal["inference", "chat", "training", "adapters"]

DEFAULT_FILE = Path("slipstream.toml")
PREFIX = "SLIPSTREAM_"
_METRICS_OFFSET, _HEALTH_OFFSET = 1000, 2000
_SERVICE_ORDER: tuple[ServiceName, ...] = ("inference", "chat", "training", "adapters")
_MIB = 1024 * 1024

# Variables of that prefix that are not settings of a server.
_OTHER_VARIABLES = frozenset(
    {"CONFIG", "HOME", "TARGET", "TOKEN", "TLS", "TLS_CA", "CA_CERT", "TIMEOUT_S", "ADDRESS"}
    | {f"{service.upper()}_ADDRESS" for service in _SERVICE_ORDER}
)
_OTHER_PREFIXES = ("CLIENT_", "TEST_", "BENCH_", "DEMO_")
# Kubernetes tells every pod of every Service in its namespace: a Service named slipstream-chat makes SLIPSTREAM_CHAT_PORT=tcp://...
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """Where and how one service listens: what the server kit needs, nothing else. Ports of 0 take any free one."""

    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    health_port: int = 0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    drain_grace_s: float = 30.0
    write_timeout_s: float = 30.0
    max_message_bytes: int = 16 * _MIB
    max_transport_message_bytes: int = 64 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything, checked. ``sources`` has "default", "file", "environment" or "flag" for each ``section.key``."""

    common: CommonConfig
    inference: InferenceConfig
    chat: ChatConfig
    training: TrainingConfig
    adapters: AdaptersConfig
    sources: Mapping[str, str]

    def port_of(self, service: ServiceName) -> int:
        """The gRPC port of ``service``; 0 where any free port is asked for."""
        own: int | None = getattr(self, service).port
        base = self.common.base_port
        if own is not None:
            return own
        return base + _SERVICE_ORDER.index(service) if base else 0

    def address_of(self, service: ServiceName) -> str:
        """HOST:PORT at which the other services of this machine reach ``service``, unless a setting says otherwise."""
        host = self.common.host
        reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "localhost") else host  # noqa: S104
        return f"[{reachable}]:{self.port_of(service)}" if ":" in reachable else f"{reachable}:{self.port_of(service)}"

    def listen(self, service: ServiceName) -> ListenConfig:
        """How ``service`` listens."""
        own: ServiceConfig = getattr(self, service)
        port = self.port_of(service)
        shared = {
            f.name: getattr(self.common, f.name) for f in dataclasses.fields(ListenConfig) if "port" not in f.name
        }
        return ListenConfig(
            port=port,
            metrics_port=_derived(own.metrics_port, port, _METRICS_OFFSET),
            health_port=_derived(own.health_port, port, _HEALTH_OFFSET),
            **shared,
        )


_SECTIONS: Mapping[str, type[Any]] = {
    "common": CommonConfig,
    "inference": InferenceConfig,
    "chat": ChatConfig,
    "training": TrainingConfig,
    "adapters": AdaptersConfig,
}


def load_settings(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """The settings of this process; raises ``ConfigError`` with every problem found.

    ``file``: None takes ``SLIPSTREAM_CONFIG``, or ``slipstream.toml`` of the working directory if there is one.
    ``flags``: values by ``section.key``; None means that the flag was not given. ``environment``: os.environ, or
    another mapping in tests.
    """
    variables = {
        key.removeprefix(PREFIX): value for key, value in (environment or {}).items() if key.startswith(PREFIX)
    }
    tables = _read_file(file, variables.get("CONFIG"))
    reading = Reading()
    by_section = _variables_by_section(variables, reading)
    given = _flags_by_section(flags or {}, reading)
    reading.problems += [
        f"[{name}]: there is no such section{nearest(name, _SECTIONS)}" for name in tables if name not in _SECTIONS
    ]
    sections = {
        name: read_section(
            name,
            cls,
            file=_table(tables, name, reading),
            environment=by_section[name],
            flags=given[name],
            reading=reading,
        )
        for name, cls in _SECTIONS.items()
    }
    settings = Settings(**cast(Any, sections), sources=dict(reading.sources))
    problems = [*reading.problems, *_contradictions(settings)]
    if problems:
        raise ConfigError(problems)
    return settings


def describe() -> Iterator[tuple[str, str, object, Bounds]]:
    """Every key there is: (``section.key``, what it is, its default, what is allowed)."""
    for section, cls in _SECTIONS.items():
        for field in dataclasses.fields(cls):
            yield f"{section}.{field.name}", field.metadata["about"], field.default, field.metadata["bounds"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name other than localhost counts as reachable from elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _derived(own: int | None, port: int, offset: int) -> int:
    if own is not None:
        return own
    return port + offset if port else 0


def _read_file(file: Path | None, from_environment: str | None) -> dict[str, object]:
    path = file or (Path(from_environment) if from_environment else DEFAULT_FILE)
    if path is DEFAULT_FILE and not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: not TOML: {error}"]) from None


def _table(tables: Mapping[str, object], name: str, reading: Reading) -> Mapping[str, object]:
    table = tables.get(name, {})
    if isinstance(table, dict):
        return table
    reading.problems.append(f"{name}: expected a table [{name}], found {table!r}")
    return {}


def _keys(section: str) -> set[str]:
    return {field.name for field in dataclasses.fields(_SECTIONS[section])}


def _variables_by_section(variables: Mapping[str, str], reading: Reading) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {name: {} for name in _SECTIONS}
    known = {
        (f"{section}_{key}" if section != "common" else key).upper(): (section, key)
        for section in _SECTIONS
        for key in _keys(section)
    }
    for name, value in variables.items():
        if name in known and not value.startswith("tcp://"):
            section, key = known[name]
            found[section][key] = value
        elif not _is_someone_elses(name, value):
            reading.problems.append(f"{PREFIX}{name}: there is no such setting{nearest(name, known)}")
    return found


def _is_someone_elses(name: str, value: str) -> bool:
    is_link = bool(_SERVICE_LINK.fullmatch(name)) or value.startswith("tcp://")
    return is_link or name in _OTHER_VARIABLES or name.startswith(_OTHER_PREFIXES)


def _flags_by_section(flags: Mapping[str, object], reading: Reading) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {name: {} for name in _SECTIONS}
    for dotted, value in flags.items():
        section, _, key = dotted.partition(".")
        if section not in found:
            reading.problems.append(f"{dotted}: there is no such section{nearest(section, _SECTIONS)}")
        elif value is not None and value != ():
            found[section][key] = value
    return found


def _contradictions(settings: Settings) -> Iterator[str]:
    """What no single value shows."""
    common = settings.common
    if (common.tls_cert is None) != (common.tls_key is None):
        yield "common.tls_cert, common.tls_key: give both or neither"
    if common.tls_client_ca is not None and common.tls_cert is None:
        yield "common.tls_client_ca: needs tls_cert and tls_key"
    protected = common.tls_cert is not None and common.token_file is not None
    if not is_loopback(common.host) and not protected and not common.insecure_listen:
        yield (
            f"common.host: {common.host!r} can be reached from other machines; give tls_cert, tls_key and token_file, "
            "or set insecure_listen"
        )
    if common.max_message_bytes > common.max_transport_message_bytes:
        yield (
            f"common.max_message_bytes: {common.max_message_bytes} is more than "
            f"max_transport_message_bytes ({common.max_transport_message_bytes})"
        )
    yield from _port_clashes(settings)


def _port_clashes(settings: Settings) -> Iterator[str]:
    owners: dict[int, str] = {}
    for service in _SERVICE_ORDER:
        listen = settings.listen(service)
        for key in ("port", "metrics_port", "health_port"):
            port: int = getattr(listen, key)
            name = f"{service}.{key}"
            if port > 65_535:
                yield f"{name}: {port} is no port; at most 65535"
            elif port and port in owners:
                yield f"{name}: {port} is already {owners[port]}"
            owners.setdefault(port, name)
