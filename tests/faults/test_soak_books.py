"""The soak's own judgement: one request that ends twice or never among many is found out, wherever it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from e2e.services import generate_request, inference_pb2
from faults.soak_books import HASTY, Counted, Seen, disagreements
from faults.soak_traffic import BadEndError, Traffic
from slipstream.type.v1 import usage_pb2
from slipstream_server.inference.metrics import InferenceMetrics, RequestMetrics
from slipstream_server.rpc.telemetry import RpcMetrics

LENGTH = usage_pb2.FINISH_REASON_LENGTH


class Service:
    """The service's own collectors, told by hand what happens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rpc = RpcMetrics(self.registry)
        metrics = InferenceMetrics(self.registry)
        self._model = metrics.of_model("tiny", max_batch_size=8)
        self._task = metrics.of_model("judge", max_batch_size=8).of_task("text-classification", is_generated=False)

    def call(self, code: grpc.StatusCode = grpc.StatusCode.OK, method: str = "StreamGenerate") -> None:
        name = f"/slipstream.inference.v1.InferenceService/{method}"
        self._rpc.started(name)
        self._rpc.finished(name, code, 0.1)

    def calls_again(self, num_calls: int) -> None:
        for _ in range(num_calls):
            self.call(grpc.StatusCode.CANCELLED)

    def joined(self, adapter: str = "") -> RequestMetrics:
        """A request in a batch."""
        version = adapter and f"adapters/{adapter}/versions/v1"
        request = self._model.of_request(version, operation="text_completion", arrival_s=0.0)
        request.joined(0.01, 5)
        return request

    def finished(self, adapter: str = "", *reasons: str) -> None:
        self.call()
        self.joined(adapter).succeeded(reasons or ("length",), 0.1)

    def left(self, adapter: str = "", reason: str = "CANCELLED") -> None:
        self.call(grpc.StatusCode.CANCELLED)
        self.joined(adapter).failed(reason)

    def stays(self, adapter: str) -> None:
        self.call()
        self.joined(adapter)

    def fails_twice(self, adapter: str) -> None:
        request = self.joined(adapter)
        request.failed("CANCELLED")
        request.failed("CANCELLED")

    def task(self, num_inputs: int) -> None:
        self.call(method="RunTask")
        for _ in range(num_inputs):
            self._task.answered(0.1)

    def counted(self) -> Counted:
        lines = generate_latest(self.registry).decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return Counted.of({name: float(value) for name, value in pairs}, generator="tiny", judge="judge")


def a_sound_day() -> tuple[Service, Seen]:
    """Answers with and without adapters, clients that leave sooner and later, one that is refused, one with a task."""
    service, seen = Service(), Seen()
    for adapter, reasons in (("", ("length",)), ("", ("length", "eos_token", "length")), ("support", ("length",))):
        service.finished(adapter, *reasons)
        seen.answered(adapter, reasons)
    for adapter in ("", "support"):
        service.left(adapter)
        seen.left[adapter] += 1
    service.left(HASTY, "DEADLINE_EXCEEDED")  # in a batch
    service.call(grpc.StatusCode.CANCELLED)  # gone before it was queued
    seen.unclear = 3  # the third never came
    service.call(grpc.StatusCode.INVALID_ARGUMENT)
    seen.refused = 1
    service.task(4)
    seen.task_calls, seen.task_inputs = 1, 4
    return service, seen


def test_books_agree_where_every_request_ended_once() -> None:
    service, seen = a_sound_day()
    assert disagreements(seen, service.counted()) == []


BREAKS: dict[str, Callable[[Service], None]] = {
    "an answer that nobody got": lambda service: service.finished(),
    "an answer counted twice": lambda service: service.joined().succeeded(("length",), 0.1),
    "a sequence of another end": lambda service: service.finished("", "eos_token"),
    "a failure after the answer": lambda service: service.joined("support").failed("CANCELLED"),
    "a request that failed by itself": lambda service: service.left("", "INTERNAL"),
    "a hasty request that never ended": lambda service: service.stays(HASTY),
    "hasty requests that ended more often than they came": lambda service: service.fails_twice(HASTY),
    "calls that nobody made": lambda service: service.calls_again(2),
    "a task that nobody asked for": lambda service: service.task(1),
}


@pytest.mark.parametrize("what", BREAKS)
def test_one_end_too_many_or_too_few_is_found_at_the_service(what: str) -> None:
    service, seen = a_sound_day()
    BREAKS[what](service)
    assert disagreements(seen, service.counted())


@pytest.mark.parametrize(
    "saw",
    [
        lambda seen: seen.answered("", ("length",)),
        lambda seen: seen.answered("support", ("eos_token",)),
        lambda seen: seen.left.update(support=1),
        lambda seen: seen.left.update(poems=1),
    ],
)
def test_an_end_that_only_the_client_saw_is_found(saw: Callable[[Seen], None]) -> None:
    service, seen = a_sound_day()
    saw(seen)
    assert disagreements(seen, service.counted())


def started() -> inference_pb2.StreamGenerateResponse:
    return inference_pb2.StreamGenerateResponse(started=inference_pb2.GenerationStarted(model="models/tiny"))


def ended(index: int = 0) -> inference_pb2.StreamGenerateResponse:
    delta = inference_pb2.GenerationDelta(index=index, finish_reason=LENGTH)
    return inference_pb2.StreamGenerateResponse(delta=delta)


def finished() -> inference_pb2.StreamGenerateResponse:
    completions = [inference_pb2.Completion(index=0, finish_reason=LENGTH)]
    return inference_pb2.StreamGenerateResponse(finished=inference_pb2.GenerationFinished(completions=completions))


class Stub:
    """Streams these events."""

    def __init__(self, *events: inference_pb2.StreamGenerateResponse) -> None:
        self._events = events

    async def StreamGenerate(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        for event in self._events:
            yield event


async def test_a_stream_with_one_end_is_entered_in_the_books() -> None:
    traffic = Traffic(Stub(started(), ended(), finished()), None)
    await traffic.read(generate_request())
    assert (traffic.seen.finished, dict(traffic.seen.sequences)) == (1, {("", "length"): 1})


@pytest.mark.parametrize(
    "events",
    [
        (),
        (started(), ended()),
        (started(), finished()),
        (started(), ended(), finished(), finished()),
        (started(), ended(), ended(), finished()),
        (started(), ended(), finished(), ended()),
        (started(), started(), ended(), finished()),
        (started(), ended(1), finished()),
    ],
)
async def test_a_stream_with_no_end_or_two_is_wrong(events: tuple[inference_pb2.StreamGenerateResponse, ...]) -> None:
    traffic = Traffic(Stub(*events), None)
    with pytest.raises(BadEndError):
        await traffic.read(generate_request())
    assert not traffic.seen.finished
