"""Versions of adapters, and the aliases that point at them: ``client.adapters.versions`` and ``.aliases``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from slipstream.adapters.v1 import adapter_service_pb2 as adapter_pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc
from slipstream_client.adapter_results import AdapterAlias, AdapterVersion, AliasMove
from slipstream_client.connection import Connection, checked_request_id
from slipstream_client.options import CallOptions
from slipstream_client.paging import all_pages
from slipstream_client.plain import plain
from slipstream_client.spelling import message_of, number_of

SERVICE = "adapters"


class AdapterVersions:
    """Versions: what an adapter's weights are and were."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def _stub(self) -> adapter_service_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_service_pb2_grpc.AdapterServiceStub(self._connection.channel(SERVICE))

    async def get(self, name: str, **call: Unpack[CallOptions]) -> AdapterVersion:
        """The version that ``support@v3``, ``support@live`` or ``support`` is now. Raises NotFoundError."""
        request = adapter_pb2.GetAdapterVersionRequest(name=name)
        return plain(
            AdapterVersion, await self._connection.unary(SERVICE, self._stub.GetAdapterVersion, request, **call)
        )

    async def list(
        self, adapter: str, *, states: Sequence[str] = (), **call: Unpack[CallOptions]
    ) -> list[AdapterVersion]:
        """The versions of an adapter, newest first; without ``states`` all but retired ones."""
        kind = adapter_pb2.AdapterVersion.State.DESCRIPTOR
        wanted = [number_of(kind, "states", state) for state in states]
        return await all_pages(
            self._connection,
            SERVICE,
            self._stub.ListAdapterVersions,
            adapter_pb2.ListAdapterVersionsRequest(parent=adapter, states=wanted),
            lambda page: [plain(AdapterVersion, version) for version in page.adapter_versions],
            **call,
        )

    async def delete(self, name: str, *, etag: str = "", **call: Unpack[CallOptions]) -> None:
        """Retire a version: its files go, its record stays. FailedPreconditionError where an alias points at it."""
        request = adapter_pb2.DeleteAdapterVersionRequest(name=name, etag=etag)
        await self._connection.unary(SERVICE, self._stub.DeleteAdapterVersion, request, **call)


class AdapterAliases:
    """Aliases: which version a name stands for, and moving it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def _stub(self) -> adapter_service_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_service_pb2_grpc.AdapterServiceStub(self._connection.channel(SERVICE))

    async def get(self, name: str, **call: Unpack[CallOptions]) -> AdapterAlias:
        """One alias, ``support@live``. Raises NotFoundError."""
        request = adapter_pb2.GetAdapterAliasRequest(name=name)
        return plain(AdapterAlias, await self._connection.unary(SERVICE, self._stub.GetAdapterAlias, request, **call))

    async def list(self, adapter: str, **call: Unpack[CallOptions]) -> list[AdapterAlias]:
        """The aliases of an adapter, by name."""
        return await all_pages(
            self._connection,
            SERVICE,
            self._stub.ListAdapterAliases,
            adapter_pb2.ListAdapterAliasesRequest(parent=adapter),
            lambda page: [plain(AdapterAlias, alias) for alias in page.adapter_aliases],
            **call,
        )

    async def set(
        self,
        name: str,
        version: str,
        *,
        expected_generation: int | None = None,
        gate: Mapping[str, Any] | None = None,
        override_gate: bool = False,
        comment: str = "",
        validate_only: bool = False,
        **call: Unpack[CallOptions],
    ) -> AliasMove:
        """Point ``support@live`` at ``v3``, making the alias where there is none.

        ``expected_generation`` (0: it must not exist) makes it a compare-and-set: AbortedError where another one has
        moved it meanwhile. FailedPreconditionError with reason GATE_CLOSED where the version does not fulfil the gate.
        """
        values = {
            "name": name,
            "version": version,
            "expected_generation": expected_generation,
            "gate": gate,
            "override_gate": override_gate,
            "comment": comment,
            "validate_only": validate_only,
        }
        request = message_of(adapter_pb2.SetAdapterAliasRequest, "", values)
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        return plain(AliasMove, await self._connection.unary(SERVICE, self._stub.SetAdapterAlias, request, **call))

    async def roll_back(
        self,
        name: str,
        *,
        expected_generation: int | None = None,
        target_generation: int | None = None,
        comment: str = "",
        **call: Unpack[CallOptions],
    ) -> AliasMove:
        """Point an alias back at the version it had before, or at the one it had at ``target_generation``."""
        values = {
            "name": name,
            "expected_generation": expected_generation,
            "target_generation": target_generation,
            "comment": comment,
        }
        request = message_of(adapter_pb2.RollBackAdapterAliasRequest, "", values)
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        return plain(AliasMove, await self._connection.unary(SERVICE, self._stub.RollBackAdapterAlias, request, **call))

    async def delete(self, name: str, *, expected_generation: int | None = None, **call: Unpack[CallOptions]) -> None:
        """Delete an alias; requests that name it fail from then on."""
        values = {"name": name, "expected_generation": expected_generation}
        request = message_of(adapter_pb2.DeleteAdapterAliasRequest, "", values)
        await self._connection.unary(SERVICE, self._stub.DeleteAdapterAlias, request, **call)
