"""The checks of ``slipstream doctor`` that look at Slipstream itself: its packages, its ports, its configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from slipstream_client.cli import server_side
from slipstream_client.cli.findings import Finding, fail, ok, warn
from slipstream_client.cli.version import DISTRIBUTION, installed_version
from slipstream_client.client import SlipstreamClient
from slipstream_client.results import HealthState, ServiceHealth
from slipstream_client.settings import ClientSettings

# What the extras are for; the others (k8s, postgres, s3, dev) are missed only by those who asked for them.
EXTRAS = {"": "client", "server": "server", "worker": "models", "train": "training"}
TELLING = ("grpcio", "protobuf", "torch", "transformers", "peft", "datasets")
PORT_TIMEOUT_S = 1.0


def check_packages() -> list[Finding]:
    """The packages of each extra: all there, or what is wrong with them."""
    version = installed_version(DISTRIBUTION)
    if not version:
        return [warn("packages", "slipstream is not installed as a package", "pip install 'slipstream[worker]'")]
    return [ok("slipstream", version), *(_extra_finding(extra) for extra in EXTRAS)]


def _extra_finding(extra: str) -> Finding:
    label = EXTRAS[extra]
    wanted = list(_requirements(extra))
    problems = list(filter(None, map(_problem, wanted)))
    if problems:
        finding = warn if extra else fail
        target = f"slipstream[{extra}]" if extra else "slipstream"
        return finding(label, ", ".join(problems), f"pip install '{target}'")
    versions = [f"{each.name} {installed_version(each.name)}" for each in wanted if each.name in TELLING]
    return ok(label, f"{len(wanted)} packages" + (f": {', '.join(versions)}" if versions else ""))


def _requirements(extra: str) -> Iterator[Requirement]:
    """What this distribution asks for on this machine, by one extra; the base where ``extra`` is empty."""
    for text in metadata.requires(DISTRIBUTION) or ():
        wanted = Requirement(text)
        by_extra = {name: wanted.marker is None or wanted.marker.evaluate({"extra": name}) for name in ("", extra)}
        # What the base asks for anyway is no part of an extra.
        if by_extra[extra] and (not extra or not by_extra[""]) and wanted.name != DISTRIBUTION:
            yield wanted


def _problem(wanted: Requirement) -> str:
    version = installed_version(wanted.name)
    if not version:
        return f"{wanted.name} is missing"
    # A build of one's own, or a pre-release, counts by its number.
    return (
        ""
        if wanted.specifier.contains(version, prereleases=True)
        else f"{wanted.name} {version} is not {wanted.specifier}"
    )


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
