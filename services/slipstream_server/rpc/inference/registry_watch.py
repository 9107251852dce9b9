"""Follows the adapter registry on behalf of the front: its events into the front's copy, then the acknowledgement.

One stream at a time, opened again with growing pauses when it breaks, falls silent or leaves a gap; it resumes after
the last event that is in force, and asks for a snapshot where that is not possible. Acknowledged is only what the copy
already answers with: from then on no request is resolved as before. Runs as one task on the event loop, for ever; the
registry being away is logged once and is no reason to end.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator

import grpc

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream_server.errors import DependencyUnavailable, InvalidRequest, SlipstreamError
from slipstream_server.inference.registry_copy import (
    AdapterFile,
    AdapterGone,
    AdapterKnown,
    AliasGone,
    AliasMoved,
    Change,
    DefaultAdapter,
    RegistryCopy,
    RegistryGap,
    ServableVersion,
    VersionGone,
)
from slipstream_server.resource_names import AdapterAliasName, AdapterName, AdapterVersionName, ModelName
from slipstream_server.rpc.status import error_of_status

logger = logging.getLogger(__name__)

DIGEST_PREFIX = "sha256:"
_SILENCE_S = 35.0
_ACKNOWLEDGE_TIMEOUT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
SERVABLE = (pb2.AdapterVersion.STATE_REGISTERED, pb2.AdapterVersion.STATE_VERIFIED)


class RegistryWatch:
    """Keeps one copy. ``resolver_id`` is this process's own among all that follow the registry."""

    def __init__(
        self, channel: grpc.aio.Channel, copy: RegistryCopy, resolver_id: str, *, silence_s: float = _SILENCE_S
    ) -> None:
        self._stub: adapter_grpc.AdapterServiceAsyncStub = adapter_grpc.AdapterServiceStub(channel)
        self._copy = copy
        self._resolver_id = resolver_id
        self._silence_s = silence_s
        self._wants_snapshot = False
        self._pause_s = _FIRST_PAUSE_S
        self._is_connected: bool | None = None

    async def run(self) -> None:
        """Never returns; cancel it."""
        while True:
            try:
                await self._follow()
            except RegistryGap as gap:
                logger.warning("the adapter registry left a gap (%s); a snapshot is taken", gap)
                self._wants_snapshot = True
            except InvalidRequest as error:  # our number is of its future: it was restored, or is another one
                self._note_broken(error)
                self._wants_snapshot = True
            except SlipstreamError as error:
                self._note_broken(error)
            await asyncio.sleep(self._pause_s * random.uniform(0.8, 1.2))  # noqa: S311 (spreads reconnections)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    async def _follow(self) -> None:
        """One stream, to its end. Raises the SlipstreamError that it ends with, or RegistryGap."""
        after = 0 if self._wants_snapshot or not self._copy.is_filled else self._copy.sequence
        request = pb2.WatchAdaptersRequest(resolver_id=self._resolver_id, after_sequence=after)
        call = self._stub.WatchAdapters(request)
        try:
            while True:
                response = await asyncio.wait_for(call.read(), self._silence_s)
                if not isinstance(response, pb2.WatchAdaptersResponse):
                    raise DependencyUnavailable("the adapter registry ended the stream")
                self._take(response)
                await self._acknowledge(response.watch_id)
                self._note_connected()
        except TimeoutError:
            raise DependencyUnavailable(f"the adapter registry was silent for {self._silence_s:g} s") from None
        except grpc.aio.AioRpcError as rpc_error:
            raise error_of_status(rpc_error) from None
        finally:
            call.cancel()

    def _take(self, response: pb2.WatchAdaptersResponse) -> None:
        match response.WhichOneof("content"):
            case "snapshot":
                self._copy.replace(response.snapshot.sequence, _changes_of_snapshot(response.snapshot))
                self._wants_snapshot = False
            case "events":
                self._copy.apply((event.sequence, _change_of(event)) for event in response.events.events)
            case "heartbeat" if response.heartbeat.sequence > self._copy.sequence:
                raise RegistryGap(f"its last event is {response.heartbeat.sequence}, ours {self._copy.sequence}")

    async def _acknowledge(self, watch_id: str) -> None:
        await self._stub.AcknowledgeAdapterEvents(
            pb2.AcknowledgeAdapterEventsRequest(
                resolver_id=self._resolver_id, watch_id=watch_id, sequence=self._copy.sequence
            ),
            timeout=_ACKNOWLEDGE_TIMEOUT_S,
        )

    def _note_connected(self) -> None:
        self._pause_s = _FIRST_PAUSE_S
        if not self._is_connected:
            self._is_connected = True
            logger.info("the adapter registry is followed from event %d on", self._copy.sequence)

    def _note_broken(self, error: SlipstreamError) -> None:
        if self._is_connected is not False:
            known = f"event {self._copy.sequence} stays in force" if self._copy.is_filled else "nothing of it is known"
            logger.warning("the adapter registry cannot be followed (%s); %s", error.message, known)
        self._is_connected = False


def version_of(message: pb2.AdapterVersion) -> ServableVersion:
    """A version as the front keeps it."""
    return ServableVersion(
        name=AdapterVersionName.parse(message.name, "version.name"),
        digest=message.digest.removeprefix(DIGEST_PREFIX),
        files=tuple(
            AdapterFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256) for file in message.files
        ),
        base_model=message.base_model,
    )


def _changes_of_snapshot(snapshot: pb2.RegistrySnapshot) -> Iterator[Change]:
    for version in snapshot.versions:
        yield version_of(version)
    for alias in snapshot.aliases:
        yield _alias(alias)
    for active in snapshot.active_adapters:
        yield _default(active)


def _change_of(event: pb2.AdapterEvent) -> Change:
    match event.WhichOneof("change"):
        case "version_changed":
            version = event.version_changed
            if version.state in SERVABLE:
                return version_of(version)
            return VersionGone(AdapterVersionName.parse(version.name, "version.name"))
        case "alias_changed":
            return _alias(event.alias_changed)
        case "alias_deleted":
            return AliasGone(AdapterAliasName.parse(event.alias_deleted, "alias_deleted"))
        case "active_adapter_changed":
            return _default(event.active_adapter_changed)
        case "adapter_changed":
            return AdapterKnown(AdapterName.parse(event.adapter_changed.name, "adapter.name"))
        case "adapter_deleted":
            return AdapterGone(AdapterName.parse(event.adapter_deleted, "adapter_deleted"))
        case _:
            raise RegistryGap(f"event {event.sequence} is of a kind that this build does not know")


def _alias(alias: pb2.AdapterAlias) -> AliasMoved:
    return AliasMoved(
        AdapterAliasName.parse(alias.name, "alias.name"), AdapterVersionName.parse(alias.version, "alias.version")
    )


def _default(active: pb2.ActiveAdapter) -> DefaultAdapter:
    model = ModelName.parse(active.model, "active_adapter.model").model
    return DefaultAdapter(model=model, adapter=active.adapter, enabled=active.enabled)
