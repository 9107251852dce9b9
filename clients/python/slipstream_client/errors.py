"""Every failure the client can raise, as one tree of exceptions.

    SlipstreamClientError
    ├── InvalidRequestError        INVALID_ARGUMENT, OUT_OF_RANGE; and arguments refused before anything was sent
    ├── NotFoundError              NOT_FOUND
    ├── AlreadyExistsError         ALREADY_EXISTS
    ├── FailedPreconditionError    FAILED_PRECONDITION
    ├── AbortedError               ABORTED
    ├── ResourceExhaustedError     RESOURCE_EXHAUSTED
    ├── UnavailableError           UNAVAILABLE
    ├── DeadlineExceededError      DEADLINE_EXCEEDED
    ├── CallCancelledError         CANCELLED
    ├── UnauthenticatedError       UNAUTHENTICATED
    ├── PermissionDeniedError      PERMISSION_DENIED
    ├── UnimplementedError         UNIMPLEMENTED
    ├── ServerError                INTERNAL, UNKNOWN, DATA_LOSS
    └── ProtocolError              the server broke the contract: a stream that ended without its last event

``CLASSES_BY_CODE`` is the only place where a gRPC status becomes a class. Not known here: channels, retries, services.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

STATUS_DETAILS_KEY = "grpc-status-details-bin"
CONNECTION_REFUSED_HINTS = ("failed to connect", "connection refused", "name resolution", "dns resolution")


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of the request: its path in proto spelling (``sampling.top_p``) and what is wrong with it."""

    field: str
    description: str


class SlipstreamClientError(Exception):
    """A call that failed.

    ``reason`` is the name of a ``slipstream.type.v1.ErrorReason`` without its prefix, empty where the failure did not
    come from a Slipstream service; ``retry_after_s`` is the server's own word that waiting helps; ``request_id`` is
    the x-request-id of the call.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        violations: Sequence[FieldViolation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __str__(self) -> str:
        """The message, and each violation that it does not already name."""
        more = [f"{v.field}: {v.description}" for v in self.violations if v.description not in self.message]
        return "; ".join([self.message, *more])


class InvalidRequestError(SlipstreamClientError):
    """The request can never succeed as it is."""

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """The error for one bad argument, found before anything was sent."""
        return cls(f"{field}: {description}", reason="INVALID_FIELD", violations=[FieldViolation(field, description)])


class NotFoundError(SlipstreamClientError):
    """Something the request names does not exist."""


class AlreadyExistsError(SlipstreamClientError):
    """A resource of that name exists, or the request_id was used for another request."""


class FailedPreconditionError(SlipstreamClientError):
    """The system is not in the state that the request needs."""


class AbortedError(SlipstreamClientError):
    """Lost a race: read again, then repeat."""


class ResourceExhaustedError(SlipstreamClientError):
    """A bound was reached: a queue, a quota, memory, a size."""


class UnavailableError(SlipstreamClientError):
    """Not now: nobody answers, or the service is starting, draining or restarting."""


class DeadlineExceededError(SlipstreamClientError):
    """The call's time was over before its answer came."""


class CallCancelledError(SlipstreamClientError):
    """The call was cancelled. Cancelling the task that awaits a call raises ``asyncio.CancelledError`` instead."""


class UnauthenticatedError(SlipstreamClientError):
    """No bearer token, or one that the service does not know."""


class PermissionDeniedError(SlipstreamClientError):
    """The token does not allow the call."""


class UnimplementedError(SlipstreamClientError):
    """This server does not answer the method."""


class ServerError(SlipstreamClientError):
    """Anything the server did not foresee. ``metadata["error_id"]`` finds it in the server's log."""


class ProtocolError(SlipstreamClientError):
    """The server's answer breaks the contract."""


CLASSES_BY_CODE: Mapping[grpc.StatusCode, type[SlipstreamClientError]] = {
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}


@dataclass(slots=True)
class _Details:
    """What the google.rpc details of a status say."""

    reason: str = ""
    metadata: Mapping[str, str] | None = None
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None


def from_rpc_error(
    error: grpc.aio.AioRpcError, *, service: str, address: str, request_id: str
) -> SlipstreamClientError:
    """The exception of the tree for a failed call to ``service`` at ``address``."""
    code = error.code()
    details = _read_details(error.trailing_metadata())
    message = error.details() or code.name
    if not details.reason:
        message = _in_words(code, message, service=service, address=address)
    return CLASSES_BY_CODE[code](
        message,
        code=code,
        reason=details.reason,
        violations=details.violations,
        metadata=details.metadata,
        retry_after_s=details.retry_after_s,
        request_id=request_id,
    )


def from_status(status: status_pb2.Status) -> SlipstreamClientError:
    """The exception of the tree for a google.rpc.Status that a resource holds."""
    details = _Details()
    for detail in status.details:
        _read_detail(detail, details)
    code = next((code for code in CLASSES_BY_CODE if code.value[0] == status.code), grpc.StatusCode.UNKNOWN)
    return CLASSES_BY_CODE[code](
        status.message,
        code=code,
        reason=details.reason,
        violations=details.violations,
        metadata=details.metadata,
        retry_after_s=details.retry_after_s,
    )


def _read_details(trailers: Iterable[tuple[str, str | bytes]] | None) -> _Details:
    found = _Details()
    packed = next((value for key, value in trailers or () if key == STATUS_DETAILS_KEY), None)
    if not isinstance(packed, bytes):
        return found
    try:
        status = status_pb2.Status.FromString(packed)
        for detail in status.details:
            _read_detail(detail, found)
    except DecodeError:
        return found  # a foreign proxy's details are no reason to hide the status itself
    return found


def _read_detail(detail: error_details_pb2.Any, found: _Details) -> None:
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    if detail.Unpack(info):
        found.reason, found.metadata = info.reason, dict(info.metadata)
    elif detail.Unpack(request):
        found.violations = tuple(FieldViolation(v.field, v.description) for v in request.field_violations)
    elif detail.Unpack(retry):
        found.retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9


def _in_words(code: grpc.StatusCode, message: str, *, service: str, address: str) -> str:
    """A status made by the transport, not by a Slipstream service, said so that a person can act on it."""
    if code is grpc.StatusCode.UNAVAILABLE and any(hint in message.lower() for hint in CONNECTION_REFUSED_HINTS):
        return f"the {service} service does not answer at {address}"
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"the connection to the {service} service at {address} was lost: {message}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the {service} service at {address} did not answer in time"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the {service} service at {address} does not know this method: {message}"
    return message
