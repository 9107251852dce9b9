"""The checks of ``slipstream doctor`` that look at Slipstream itself: its packages, its ports, its configuration."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from importlib import metadata

from slipstream_client.cli import server_side
from slipstream_client.cli.findings import Finding, fail, ok, warn
from slipstream_client.cli.version import DISTRIBUTION, installed_version
from slipstream_client.client import SlipstreamClient
from slipstream_client.results import HealthState, ServiceHealth
from slipstream_client.settings import ClientSettings

# What the extras are for; the others (k8s, postgres, s3, dev) are missed only by those who asked for them.
EXTRAS = {"": "client", "server": "server", "worker": "models", "train": "training"}
TELLING = ("grpcio", "protobuf", "torch", "transformers", "peft", "datasets")
REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*([^;]*)(?:;(.*))?$")
IN_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
PORT_TIMEOUT_S = 1.0


def check_packages() -> list[Finding]:
    """The packages of each extra: all there, or which are missing."""
    version = installed_version(DISTRIBUTION)
    if not version:
        return [warn("packages", "slipstream is not installed as a package", "pip install 'slipstream[worker]'")]
    by_extra: dict[str, list[tuple[str, str]]] = {extra: [] for extra in EXTRAS}
    for name, allowed, extra in _requirements():
        if extra in by_extra:
            by_extra[extra].append((name, allowed))
    return [ok("slipstream", version), *(_extra_finding(extra, names) for extra, names in by_extra.items() if names)]


def _requirements() -> Iterator[tuple[str, str, str]]:
    """(package, allowed versions, extra) of what this distribution asks for; the extra is empty for the base."""
    for text in metadata.requires(DISTRIBUTION) or ():
        if match := REQUIREMENT.match(text):
            name, allowed, marker = match.groups()
            extra = IN_EXTRA.search(marker or "")
            if name.lower() != DISTRIBUTION:
                yield name, allowed.strip(), extra.group(1) if extra else ""


def _extra_finding(extra: str, packages: list[tuple[str, str]]) -> Finding:
    label = EXTRAS[extra]
    missing = [name for name, _ in packages if not installed_version(name)]
    if missing:
        target = f"slipstream[{extra}]" if extra else "slipstream"
        finding = warn if extra else fail
        return finding(label, f"not installed: {', '.join(missing)}", f"pip install '{target}'")
    versions = [f"{name} {installed_version(name)}" for name, _ in packages if name in TELLING]
    return ok(label, f"{len(packages)} packages" + (f": {', '.join(versions)}" if versions else ""))


async def check_ports() -> list[Finding]:
    """Who, if anybody, listens where the services would."""
    settings = ClientSettings.resolve()
    async with SlipstreamClient(settings=settings) as client:
        health = await client.status(timeout_s=PORT_TIMEOUT_S)
    taken = await asyncio.gather(*(_is_open(service.address) for service in health))
    return [_port_finding(service, is_open) for service, is_open in zip(health, taken, strict=True)]


def _port_finding(service: ServiceHealth, is_open: bool) -> Finding:
    name = service.service
    if service.state is HealthState.SERVING:
        return ok(name, f"serving at {service.address}")
    if service.state is HealthState.NOT_SERVING:
        return warn(name, f"runs at {service.address}, but does not serve yet", "see its log, or slipstream status")
    if is_open:
        mend = "start with another --base-port, or set SLIPSTREAM_ADDRESS and the token to reach the one meant"
        return warn(name, f"something else, or a service that refuses us, is at {service.address}", mend)
    return ok(name, f"not running; {service.address} is free")


async def _is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return False
    try:
        async with asyncio.timeout(PORT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def check_config() -> list[Finding]:
    """The services' configuration, where there is a server."""
    backend = server_side.module()
    if backend is None:
        return []
    try:
        chosen = [row for row in backend.check_config(None) if row[2] != "default"]
    except backend.ConfigError as error:
        return [fail("configuration", problem, "see slipstream config check --all") for problem in error.problems]
    return [ok("configuration", f"{len(chosen)} settings differ from their defaults" if chosen else "all defaults")]
