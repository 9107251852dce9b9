"""The one place where an exception becomes a gRPC status, and a status from another service an exception again.

``STATUS_CODES`` maps the classes directly below ``SlipstreamError``; everything else follows from inheritance. Every
status carries ``google.rpc.ErrorInfo`` (domain "slipstream"), field violations as ``BadRequest``, and ``RetryInfo``
where waiting helps. An exception that is no SlipstreamError becomes INTERNAL with an id; its text stays in the log.
Pure functions, any thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from urllib.parse import quote

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from slipstream_server import errors
from slipstream_server.logs import unforeseen

logger = logging.getLogger(__name__)

DOMAIN = "slipstream"
DETAILS_KEY = "grpc-status-details-bin"

STATUS_CODES: Mapping[type[errors.SlipstreamError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

# After how long a client does well to come back, where the error does not say itself. None: waiting does not help.
RETRY_AFTER_S: Mapping[type[errors.SlipstreamError], float | None] = {
    errors.ResourceExhausted: 1.0,
    errors.MessageTooLarge: None,
    # What has not found room in the memory of a device, alone, will not find it later.
    errors.OutOfMemory: None,
    # A size over its limit stays over it.
    errors.QuotaExceeded: None,
    errors.SlowReader: None,
    errors.StorageFull: 30.0,
    errors.Unavailable: 1.0,
    errors.ModelNotReady: 2.0,
    # A request that two workers died of must not be sent a third time; where waiting helps, the error says so itself.
    errors.WorkerDied: None,
}

# Trailers travel in one header list, which clients cap at 8 KiB by default: above it the client sees a transport error
# instead of ours. Each step cuts harder: (characters of a text, number of violations and of metadata entries).
_TRAILER_BUDGET_BYTES = 6_500
_CUTS = ((2_000, 50), (500, 20), (200, 8), (80, 4))


def code_of(error: errors.SlipstreamError) -> grpc.StatusCode:
    """The status code of the nearest class of the table."""
    return next(STATUS_CODES[cls] for cls in type(error).__mro__ if cls in STATUS_CODES)


def retry_after_s(error: errors.SlipstreamError) -> float | None:
    """What the error says itself, else what its class says, else None."""
    if error.retry_after_s is not None:
        return error.retry_after_s
    return next((RETRY_AFTER_S[cls] for cls in type(error).__mro__ if cls in RETRY_AFTER_S), None)


def status_of(error: errors.SlipstreamError) -> status_pb2.Status:
    """The whole status, cut where it would not fit into a client's header list."""
    for max_chars, max_entries in _CUTS:
        status = _build(error, max_chars, max_entries)
        if _trailer_bytes(status) <= _TRAILER_BUDGET_BYTES:
            break
    return status


def as_slipstream_error(exception: BaseException) -> errors.SlipstreamError:
    """The error to answer with; whatever is unforeseen is logged here, with its traceback, and answered by an id.

    ``asyncio.CancelledError`` must not come here: it is no answer, the caller re-raises it.
    """
    if isinstance(exception, errors.SlipstreamError):
        return exception
    if isinstance(exception, grpc.aio.AioRpcError):
        return error_of_status(exception)
    if isinstance(exception, BaseExceptionGroup):
        leaves = list(_leaves(exception))
        known = [leaf for leaf in leaves if isinstance(leaf, errors.SlipstreamError)]
        if known and len(known) == len(leaves):
            return known[0]
    return unforeseen(exception, "answering a call")


def error_of_status(rpc_error: grpc.aio.AioRpcError) -> errors.SlipstreamError:
    """The error another Slipstream service answered with, as the class it was raised as there.

    A status without our details (a proxy, a broken connection) becomes ``DependencyUnavailable`` where it is
    UNAVAILABLE, and otherwise the class of its code; what that peer wrote is not passed on.
    """
    code = rpc_error.code()
    status = _details_of(rpc_error)
    info, violations, retry = _unpack(status)
    if info is None or info.domain != DOMAIN:
        return _without_details(code)
    cls = _class_of(info.reason, code)
    return cls(status.message, violations=violations, metadata=dict(info.metadata), retry_after_s=retry)


def _build(error: errors.SlipstreamError, max_chars: int, max_entries: int) -> status_pb2.Status:
    message = _clean(error.message, max_chars)
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    metadata = {_clean(k, 64): _clean(v, max_chars) for k, v in list(error.metadata.items())[:max_entries]}
    _pack(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if error.violations:
        _pack(status, _bad_request(error.violations[:max_entries], max_chars))
    if (delay_s := retry_after_s(error)) is not None:
        delay = Duration()
        delay.FromMilliseconds(round(delay_s * 1000))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _bad_request(violations: tuple[errors.FieldViolation, ...], max_chars: int) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_clean(v.field, 200), description=_clean(v.description, max_chars)
            )
            for v in violations
        ]
    )


def _pack(status: status_pb2.Status, detail: Message) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _clean(text: str, max_chars: int) -> str:
    """Text that protobuf and an HTTP/2 header accept: callers' values may hold lone surrogates and NUL."""
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\\0")


def _trailer_bytes(status: status_pb2.Status) -> int:
    # grpc-message is percent-encoded, the details are base64.
    details_bytes: int = status.ByteSize()
    return len(quote(status.message, safe=" ")) + details_bytes * 4 // 3


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exception in group.exceptions:
        if isinstance(exception, BaseExceptionGroup):
            yield from _leaves(exception)
        else:
            yield exception


def _details_of(rpc_error: grpc.aio.AioRpcError) -> status_pb2.Status:
    status = status_pb2.Status()
    for key, value in rpc_error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:
                logger.warning("a service answered with status details that do not parse")
    return status


def _unpack(
    status: status_pb2.Status,
) -> tuple[error_details_pb2.ErrorInfo | None, list[errors.FieldViolation], float | None]:
    info: error_details_pb2.ErrorInfo | None = None
    violations: list[errors.FieldViolation] = []
    retry: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations += [errors.FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_info = error_details_pb2.RetryInfo()
            detail.Unpack(retry_info)
            retry = retry_info.retry_delay.ToMilliseconds() / 1000
    return info, violations, retry


def _without_details(code: grpc.StatusCode) -> errors.SlipstreamError:
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.DependencyUnavailable("a service this one depends on cannot be reached")
    cls = next((cls for cls, mapped in STATUS_CODES.items() if mapped is code), errors.InternalError)
    name = code_pb2.Code.Name(code.value[0])
    return cls(f"a service this one depends on answered {name} without saying why")


def _class_of(reason: str, code: grpc.StatusCode) -> type[errors.SlipstreamError]:
    """The most particular class of that reason, if its code agrees; else the class of the code."""
    top = next((cls for cls, mapped in STATUS_CODES.items() if mapped is code), errors.InternalError)
    found = [cls for cls in _descendants(top) if cls.reason == reason]
    return found[-1] if found else top


def _descendants(cls: type[errors.SlipstreamError]) -> Iterator[type[errors.SlipstreamError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _descendants(child)
