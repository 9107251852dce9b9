"""The table from exceptions to statuses: total, and bounded in what it sends."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import Metadata

from slipstream.type.v1 import error_reason_pb2
from slipstream_server import errors
from slipstream_server.rpc.status import (
    STATUS_CODES,
    as_slipstream_error,
    code_of,
    error_of_status,
    retry_after_s,
    status_of,
)

# From the contract's table of cases, by hand: class, code, does waiting help?
EXPECTED = {
    "InvalidField": ("INVALID_ARGUMENT", False),
    "PromptTooLong": ("INVALID_ARGUMENT", False),
    "UnsupportedField": ("INVALID_ARGUMENT", False),
    "UnknownParameter": ("INVALID_ARGUMENT", False),
    "MalformedRequest": ("INVALID_ARGUMENT", False),
    "ModelNotFound": ("NOT_FOUND", False),
    "JobNotFound": ("NOT_FOUND", False),
    "ResourceExists": ("ALREADY_EXISTS", False),
    "WrongState": ("FAILED_PRECONDITION", False),
    "IncompatibleAdapter": ("FAILED_PRECONDITION", False),
    "GateClosed": ("FAILED_PRECONDITION", False),
    "StaleEtag": ("ABORTED", False),
    "StaleGeneration": ("ABORTED", False),
    "QueueFull": ("RESOURCE_EXHAUSTED", True),
    "QuotaExceeded": ("RESOURCE_EXHAUSTED", False),
    "MessageTooLarge": ("RESOURCE_EXHAUSTED", False),
    "StorageFull": ("RESOURCE_EXHAUSTED", True),
    "OutOfMemory": ("RESOURCE_EXHAUSTED", False),
    "Draining": ("UNAVAILABLE", True),
    "ModelNotReady": ("UNAVAILABLE", True),
    "WorkerDied": ("UNAVAILABLE", False),
    "DeadlineExceeded": ("DEADLINE_EXCEEDED", False),
    "Cancelled": ("CANCELLED", False),
    "Unauthenticated": ("UNAUTHENTICATED", False),
    "PermissionDenied": ("PERMISSION_DENIED", False),
    "Unimplemented": ("UNIMPLEMENTED", False),
    "InternalError": ("INTERNAL", False),
}


def all_error_classes() -> Iterator[type[errors.SlipstreamError]]:
    for _, cls in inspect.getmembers(errors, inspect.isclass):
        if issubclass(cls, errors.SlipstreamError) and cls is not errors.SlipstreamError:
            yield cls


def unpacked(status: status_pb2.Status, kind: type) -> object | None:
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None


@pytest.mark.parametrize("cls", list(all_error_classes()), ids=lambda cls: cls.__name__)
def test_every_class_has_a_code_and_a_reason_of_the_contract(cls: type[errors.SlipstreamError]) -> None:
    status = status_of(cls("why"))
    info = unpacked(status, error_details_pb2.ErrorInfo)
    assert info is not None
    assert info.domain == "slipstream"
    assert f"ERROR_REASON_{info.reason}" in dict(error_reason_pb2.ErrorReason.items())
    assert status.code == code_of(cls("why")).value[0] != 0


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items())
def test_codes_and_retry_advice_are_those_of_the_contract(name: str, expected: tuple[str, bool]) -> None:
    error = getattr(errors, name)("why")
    status = status_of(error)
    assert (code_of(error).name, unpacked(status, error_details_pb2.RetryInfo) is not None) == expected


def test_every_class_below_the_root_is_in_the_table() -> None:
    assert set(STATUS_CODES) == set(errors.SlipstreamError.__subclasses__())
    assert len(set(STATUS_CODES.values())) == len(STATUS_CODES)


def test_an_error_says_itself_when_to_come_back() -> None:
    assert retry_after_s(errors.QueueFull("full", retry_after_s=2.5)) == 2.5
    retry = unpacked(status_of(errors.QueueFull("full", retry_after_s=2.5)), error_details_pb2.RetryInfo)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (2, 500_000_000)


def test_violations_become_bad_request() -> None:
    status = status_of(errors.InvalidField.of("sampling.top_p", "2 is not allowed; allowed: 0 to 1"))
    bad = unpacked(status, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("sampling.top_p", "2 is not allowed; allowed: 0 to 1")
    ]


@pytest.mark.parametrize("text", ["é" * 10_000, "\ud800\0", "a" * 100_000, "日本語" * 5_000, "%" * 9_000])
def test_a_status_fits_into_a_header_list_whatever_the_caller_sent(text: str) -> None:
    violations = [errors.FieldViolation(f"field_{i}" * 50, text) for i in range(500)]
    status = status_of(errors.InvalidField(text, violations=violations, metadata={f"k{i}": text for i in range(100)}))
    # Percent-encoding may triple the message; base64 adds a third to the details. gRPC's default limit is 8 KiB.
    assert len(status.message.encode()) * 3 + len(status.SerializeToString()) * 4 / 3 < 8_000
    assert unpacked(status, error_details_pb2.ErrorInfo).reason == "INVALID_FIELD"


def test_an_unforeseen_exception_tells_nothing_but_an_id(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = as_slipstream_error(RuntimeError("secret at /etc/passwd"))
    assert isinstance(error, errors.InternalError)
    assert "secret" not in error.message
    assert error.metadata["error_id"] in error.message
    assert error.metadata["error_id"] in caplog.text
    assert "secret at /etc/passwd" in caplog.text


def test_a_group_of_known_errors_answers_with_the_first() -> None:
    group = ExceptionGroup("tasks", [ExceptionGroup("inner", [errors.QueueFull("a")]), errors.NotFound("b")])
    assert isinstance(as_slipstream_error(group), errors.QueueFull)
    mixed = ExceptionGroup("tasks", [errors.QueueFull("a"), RuntimeError("b")])
    assert isinstance(as_slipstream_error(mixed), errors.InternalError)


def rpc_error(code: grpc.StatusCode, status: status_pb2.Status | None = None) -> grpc.aio.AioRpcError:
    trailing = Metadata(*([("grpc-status-details-bin", status.SerializeToString())] if status else []))
    return grpc.aio.AioRpcError(code, Metadata(), trailing, details="what the peer wrote, with /its/paths")


@pytest.mark.parametrize("cls", list(all_error_classes()), ids=lambda cls: cls.__name__)
def test_an_error_survives_the_way_through_another_service(cls: type[errors.SlipstreamError]) -> None:
    sent = cls("why", violations=[errors.FieldViolation("f", "d")], metadata={"k": "v"}, retry_after_s=3.0)
    got = error_of_status(rpc_error(code_of(sent), status_of(sent)))
    assert (got.reason, got.message, got.violations, got.metadata, got.retry_after_s) == (
        cls.reason,
        "why",
        sent.violations,
        {"k": "v"},
        3.0,
    )
    assert code_of(got) is code_of(sent)


def test_a_foreign_status_keeps_its_code_but_not_its_text() -> None:
    gone = error_of_status(rpc_error(grpc.StatusCode.UNAVAILABLE))
    assert isinstance(gone, errors.DependencyUnavailable)
    foreign = status_pb2.Status(code=5, message="no /its/paths")
    packed = AnyMessage()
    packed.Pack(error_details_pb2.ErrorInfo(reason="X", domain="elsewhere"))
    foreign.details.append(packed)
    got = error_of_status(rpc_error(grpc.StatusCode.NOT_FOUND, foreign))
    assert isinstance(got, errors.NotFound)
    assert "/its/paths" not in got.message
