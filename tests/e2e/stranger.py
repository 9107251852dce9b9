"""A client that knows nothing but an address: message types come by reflection, details are google's own types.

Synchronous: what it shows is what any stock client sees. No module of the product, and no committed stub, is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

GENERATE = "slipstream.inference.v1.InferenceService/Generate"
STREAM_GENERATE = "slipstream.inference.v1.InferenceService/StreamGenerate"
COMPLETE = "slipstream.chat.v1.ChatService/Complete"
STREAM_COMPLETE = "slipstream.chat.v1.ChatService/StreamComplete"
STREAM_MESSAGE = "slipstream.chat.v1.ChatService/StreamMessage"

TIMEOUT_S = 60.0
_UNBOUNDED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """How a call failed: its code's name, its text, and what its google.rpc details say."""

    code: str
    message: str
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    retry_s: float | None = None

    @property
    def text(self) -> str:
        """Everything in it that a person could read."""
        return "\n".join([self.message, *self.metadata.values(), *self.fields, *self.descriptions])


class Refused(Exception):
    """A call that did not succeed."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(repr(refusal))
        self.refusal = refusal


class Stranger:
    """Calls by method path (``package.Service/Method``), requests as JSON-like values or raw bytes."""

    def __init__(self, channel: grpc.Channel, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self.channel = channel
        self.metadata = tuple(metadata)
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> list[str]:
        return sorted(self._database.get_services())

    def call(self, method: str, request: object, *, timeout_s: float = TIMEOUT_S) -> Any:
        """The answer of a unary method; raises Refused."""
        with _refusals():
            return self._callable(method)(self.encode(method, request), timeout=timeout_s, metadata=self.metadata)

    def stream(self, method: str, request: object, *, timeout_s: float = TIMEOUT_S) -> Iterator[Any]:
        """The answers of a server-streaming method; raises Refused. The call is cancelled when it is left."""
        call = self._callable(method)(self.encode(method, request), timeout=timeout_s, metadata=self.metadata)
        try:
            with _refusals():
                yield from call
        finally:
            call.cancel()

    def refusal(self, method: str, request: object, **kwargs: Any) -> Refusal:
        """How a call fails; an AssertionError where it does not."""
        try:
            answer = (
                list(self.stream(method, request, **kwargs))
                if self._streams(method)
                else [self.call(method, request, **kwargs)]
            )
        except Refused as refused:
            return refused.refusal
        raise AssertionError(f"{method} accepted it and answered {str(answer)[:500]}")

    def encode(self, method: str, request: object) -> bytes:
        if isinstance(request, bytes):
            return request
        message = GetMessageClass(self._descriptor(method).input_type)()
        json_format.ParseDict(request, message)
        return bytes(message.SerializeToString())

    def message(self, method: str, request: object) -> Any:
        """A request of ``method`` to be changed further."""
        message = GetMessageClass(self._descriptor(method).input_type)()
        json_format.ParseDict(request, message)
        return message

    def _descriptor(self, method: str) -> Any:
        service, _, name = method.partition("/")
        return self._pool.FindServiceByName(service).methods_by_name[name]

    def _streams(self, method: str) -> bool:
        return bool(self._descriptor(method).server_streaming)

    def _callable(self, method: str) -> Any:
        make = self.channel.unary_stream if self._streams(method) else self.channel.unary_unary
        return make(f"/{method}", None, GetMessageClass(self._descriptor(method).output_type).FromString)


@contextmanager
def stranger(address: str, *, token: str = "") -> Iterator[Stranger]:
    """A stranger with a channel of its own."""
    with grpc.insecure_channel(address, options=_UNBOUNDED) as channel:
        yield Stranger(channel, [("authorization", f"Bearer {token}")] if token else [])


def refusal_of(error: grpc.RpcError) -> Refusal:
    """What a failed call says, by google's own types."""
    trailers = dict(error.trailing_metadata() or ())
    found: dict[str, Any] = {}
    if "grpc-status-details-bin" in trailers:
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        assert status.code == error.code().value[0]
        for detail in status.details:
            found.update(_read(detail))
    return Refusal(code=error.code().name, message=error.details() or "", **found)


def _read(detail: Any) -> dict[str, Any]:
    match detail.type_url.rpartition(".")[2]:
        case "ErrorInfo":
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            return {"reason": info.reason, "domain": info.domain, "metadata": dict(info.metadata)}
        case "BadRequest":
            violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
            fields = tuple(violation.field for violation in violations)
            return {"fields": fields, "descriptions": tuple(violation.description for violation in violations)}
        case "RetryInfo":
            return {
                "retry_s": error_details_pb2.RetryInfo.FromString(detail.value)
                .retry_delay.ToTimedelta()
                .total_seconds()
            }
    raise AssertionError(f"an error detail nobody promised: {detail.type_url}")


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise Refused(refusal_of(error)) from None
