"""The client's exceptions: total over the statuses, and readable."""

import grpc
import pytest
from google.rpc import error_details_pb2
from tests.unit.client.fake_services import Failure

from slipstream_client import errors


def rpc_error(code: grpc.StatusCode, details: str = "", packed: bytes | None = None) -> grpc.aio.AioRpcError:
    trailers = grpc.aio.Metadata(*((("grpc-status-details-bin", packed),) if packed is not None else ()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details)


def understood(error: grpc.aio.AioRpcError) -> errors.SlipstreamClientError:
    return errors.from_rpc_error(error, service="inference", address="127.0.0.1:50051", request_id="r-1")


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_becomes_a_class_of_the_tree(code):
    error = understood(rpc_error(code, "words"))
    assert type(error) is not errors.SlipstreamClientError
    assert isinstance(error, errors.SlipstreamClientError)
    assert (error.code, error.request_id) == (code, "r-1")


def test_the_table_has_no_status_too_many():
    assert set(errors.CLASSES_BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


def test_details_are_read():
    packed = Failure(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        reason="QUEUE_FULL",
        retry_after_s=1.5,
        violations=[("sampling.top_p", "1.5 is above 1")],
        metadata={"queue": "normal"},
    ).packed()
    error = understood(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", packed))
    assert isinstance(error, errors.ResourceExhaustedError)
    assert (error.reason, error.retry_after_s, error.metadata) == ("QUEUE_FULL", 1.5, {"queue": "normal"})
    assert error.violations == (errors.FieldViolation("sampling.top_p", "1.5 is above 1"),)


def test_text_names_a_violation_once():
    violations = [
        errors.FieldViolation("sampling.top_p", "1.5 is above 1"),
        errors.FieldViolation("stop[2]", "is empty"),
    ]
    error = errors.InvalidRequestError("sampling.top_p: 1.5 is above 1", violations=violations)
    assert str(error) == "sampling.top_p: 1.5 is above 1; stop[2]: is empty"


@pytest.mark.parametrize("packed", [b"\xff\xff\xff", b"", error_details_pb2.ErrorInfo(reason="X").SerializeToString()])
def test_foreign_details_do_not_hide_the_status(packed):
    error = understood(rpc_error(grpc.StatusCode.NOT_FOUND, "gone", packed))
    assert isinstance(error, errors.NotFoundError)
    assert error.reason == ""


def test_refused_connection_is_said_in_words():
    text = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:50051: Connection refused"
    error = understood(rpc_error(grpc.StatusCode.UNAVAILABLE, text))
    assert str(error) == "the inference service does not answer at 127.0.0.1:50051"
