"""How a service is, by the standard health protocol (grpc.health.v1)."""

from __future__ import annotations

import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from slipstream_client.connection import Connection
from slipstream_client.errors import from_rpc_error
from slipstream_client.results import HealthState, ServiceHealth

STATES = {
    health_pb2.HealthCheckResponse.SERVING: HealthState.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: HealthState.NOT_SERVING,
}


async def check(connection: Connection, service: str, timeout_s: float) -> ServiceHealth:
    """Ask ``service`` once, without retries. Failures become a state and a ``problem``, not an exception."""
    address = connection.settings.addresses[service]
    token = connection.settings.token
    stub = health_pb2_grpc.HealthStub(connection.channel(service))
    started_s = time.perf_counter()
    try:
        answer = await stub.Check(
            health_pb2.HealthCheckRequest(),
            timeout=timeout_s,
            metadata=(("authorization", f"Bearer {token}"),) if token else None,
        )
    except grpc.aio.AioRpcError as error:
        failure = from_rpc_error(error, service=service, address=address, request_id="")
        unreachable = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        state = HealthState.UNREACHABLE if unreachable else HealthState.UNKNOWN
        return ServiceHealth(service=service, address=address, state=state, problem=str(failure))
    latency_ms = (time.perf_counter() - started_s) * 1000
    return ServiceHealth(
        service=service,
        address=address,
        state=STATES.get(answer.status, HealthState.UNKNOWN),
        latency_ms=round(latency_ms, 2),
    )
