"""The asynchronous client against real gRPC services."""

import asyncio
import gc
import subprocess

import grpc
import pytest
from tests.unit.client.fake_services import MODEL, Failure, FakeServices, serving, settings_for

from slipstream.chat.v1 import chat_service_pb2 as chat_pb2
from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream.type.v1 import progress_pb2
from slipstream_client import (
    ClientSettings,
    DeadlineExceededError,
    FinishReason,
    HealthState,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
    ResourceExhaustedError,
    SlipstreamClient,
    UnavailableError,
    Usage,
)
from slipstream_client.settings import SERVICES

UNAVAILABLE = Failure(code=grpc.StatusCode.UNAVAILABLE, reason="MODEL_NOT_READY")


@pytest.fixture
def fake() -> FakeServices:
    return FakeServices()


@pytest.fixture
async def client(fake):
    async with serving(fake) as address, SlipstreamClient(settings=settings_for(address)) as connected:
        yield connected


async def test_generate_returns_plain_values(client, fake):
    answer = await client.generate("Hi", temperature=0.5, request_id="r-7")
    assert (answer.text, answer.finish_reason, answer.model) == ("Hello there!", FinishReason.STOP_STRING, MODEL)
    assert answer.completions[0].matched_stop == "!"
    assert answer.usage == Usage(prompt_tokens=5, completion_tokens=3, cached_prompt_tokens=2)
    assert fake.seen[0].request.sampling.temperature == 0.5
    assert fake.seen[0].metadata["x-request-id"] == "r-7"


async def test_stream_tells_at_its_end_how_it_went(client):
    stream = client.stream_generate("Hi")
    assert [delta.text async for delta in stream] == ["Hello", " there", "!"]
    assert (stream.text, stream.model, stream.finish_reason) == ("Hello there!", MODEL, FinishReason.LENGTH)
    assert stream.usage.completion_tokens == 3
    assert stream.finished


async def test_chat_in_one_piece_and_streamed(client, fake):
    messages = [{"role": "user", "content": "Hi"}]
    answer = await client.complete(messages, max_new_tokens=3)
    assert (answer.message.role, answer.text) == ("assistant", "Hello there!")
    assert fake.seen[0].request.options.stopping.max_new_tokens == 3
    stream = client.stream_complete(messages)
    assert await stream.read_all() == "Hello there!"
    assert stream.finish_reason is FinishReason.EOS_TOKEN


async def test_tokenizer_calls(client):
    assert (await client.tokenize("abc")).ids == (0, 1, 2)
    assert (await client.detokenize([4, 5])).text == "4 5"
    assert (await client.count_tokens("abc")).context_tokens == 2048


async def test_models_are_listed_over_all_pages(client, fake):
    loading = model_pb2.Model(name="models/big", state=model_pb2.Model.STATE_LOADING)
    loading.progress.CopyFrom(progress_pb2.Progress(stage="loading", completed_count=1, total_count=4, unit="tensors"))
    fake.models += [loading, model_pb2.Model(name="models/new", state=99)]
    ready, big, newer = await client.models.list()
    assert (ready.id, ready.state, ready.progress) == ("tiny", "ready", None)
    assert (big.state, big.progress.fraction) == ("loading", 0.25)
    assert newer.state == ""
    with pytest.raises(NotFoundError) as caught:
        await client.models.get("other")
    assert caught.value.reason == "MODEL_NOT_FOUND"


async def test_retry_waits_as_long_as_the_server_says(client, fake):
    fake.failures.append(Failure(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after_s=0.3))
    await client.generate("Hi", timeout_s=5)
    first, second = fake.seen
    assert second.time_s - first.time_s >= 0.3  # far above the policy's own 0.02 s
    assert first.metadata["x-request-id"] == second.metadata["x-request-id"]
    assert second.time_remaining_s < first.time_remaining_s


async def test_attempts_end_and_the_last_failure_is_raised(client, fake):
    fake.failures.extend([UNAVAILABLE] * 9)
    with pytest.raises(UnavailableError) as caught:
        await client.generate("Hi", request_id="r-1")
    assert (caught.value.reason, caught.value.request_id) == ("MODEL_NOT_READY", "r-1")
    assert len(fake.seen) == 3


async def test_no_retry_of_what_can_never_succeed(client, fake):
    fake.failures.append(
        Failure(code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_FIELD", violations=[("sampling.top_p", "is 7")])
    )
    with pytest.raises(InvalidRequestError, match=r"sampling\.top_p: is 7"):
        await client.generate("Hi")
    assert len(fake.seen) == 1


async def test_no_retry_that_the_deadline_would_cut_off(client, fake):
    fake.failures.append(Failure(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after_s=30))
    with pytest.raises(ResourceExhaustedError):
        await client.generate("Hi", timeout_s=5)
    assert len(fake.seen) == 1


async def test_calls_that_change_something_are_sent_once_without_a_request_id(client, fake):
    fake.failures.append(UNAVAILABLE)
    create = client.chat_stub.CreateConversation
    with pytest.raises(UnavailableError):
        await client.connection.unary("chat", create, chat_pb2.CreateConversationRequest(), idempotent=False)
    assert len(fake.seen) == 1


async def test_stream_is_retried_before_the_first_delta(client, fake):
    fake.failures.append(UNAVAILABLE)
    assert await client.stream_generate("Hi").read_all() == "Hello there!"
    assert len(fake.seen) == 2


@pytest.mark.parametrize("method", ["stream_generate", "stream_complete"])
async def test_stream_is_not_retried_after_the_first_delta(client, fake, method):
    fake.failures.append(Failure(code=grpc.StatusCode.UNAVAILABLE, retry_after_s=0.01, after_deltas=1))
    prompt = "Hi" if method == "stream_generate" else [{"role": "user", "content": "Hi"}]
    stream = getattr(client, method)(prompt)
    with pytest.raises(UnavailableError):
        await stream.read_all()
    assert stream.text == "Hello"
    assert len(fake.seen) == 1


async def test_leaving_the_loop_cancels_on_the_server(client, fake):
    fake.hang_after_deltas = 1
    stream = client.stream_generate("Hi")
    async for _ in stream:
        break
    await asyncio.wait_for(fake.cancelled.wait(), 5)
    assert stream.text == "Hello"


async def test_an_exception_in_the_loop_cancels_on_the_server(client, fake):
    fake.hang_after_deltas = 1
    with pytest.raises(ZeroDivisionError):
        async with client.stream_complete([{"role": "user", "content": "Hi"}]) as stream:
            async for _ in stream:
                raise ZeroDivisionError
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_a_forgotten_iterator_cancels_on_the_server(client, fake):
    fake.hang_after_deltas = 1
    stream = client.stream_generate("Hi")
    assert (await anext(stream)).text == "Hello"
    gc.disable()  # reference counting alone must do
    try:
        del stream
        await asyncio.wait_for(fake.cancelled.wait(), 5)
    finally:
        gc.enable()


async def test_cancelling_the_task_cancels_on_the_server(client, fake):
    fake.hang_after_deltas = 0
    task = asyncio.create_task(client.stream_generate("Hi").read_all())
    while not fake.seen:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(fake.cancelled.wait(), 5)


async def test_deadline_ends_a_stream(client, fake):
    fake.hang_after_deltas = 1
    stream = client.stream_generate("Hi", timeout_s=0.3)
    with pytest.raises(DeadlineExceededError):
        await stream.read_all()
    assert stream.text == "Hello"


async def test_a_stream_without_its_last_event_is_an_error(client, fake):
    fake.leave_out_finished = True
    with pytest.raises(ProtocolError, match="cut short"):
        await client.stream_generate("Hi").read_all()


async def test_token_goes_along(fake):
    async with serving(fake) as address:
        async with SlipstreamClient(settings=settings_for(address, token="abc")) as client:
            await client.generate("Hi")
    assert fake.seen[0].metadata["authorization"] == "Bearer abc"


@pytest.fixture
def certificate(tmp_path):
    """A certificate for localhost that is its own authority: (certificate, key)."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


async def test_tls_with_an_authority_of_ones_own(fake, certificate):
    cert, key = certificate
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    async with serving(fake, credentials=credentials) as address:
        named = address.replace("127.0.0.1", "localhost")
        async with SlipstreamClient(inference_address=named, ca_cert=cert, token="abc") as client:
            assert (await client.generate("Hi")).text == "Hello there!"
        async with SlipstreamClient(inference_address=named, tls=True) as client:
            with pytest.raises(UnavailableError):
                await client.generate("Hi", timeout_s=1)
    assert len(fake.seen) == 1


async def test_status_of_running_and_missing_services(fake):
    async with serving(fake) as address:
        addresses = dict.fromkeys(SERVICES, address) | {"training": "127.0.0.1:1"}
        async with SlipstreamClient(settings=ClientSettings(addresses=addresses)) as client:
            by_name = {health.service: health for health in await client.status()}
    assert by_name["inference"].state is HealthState.SERVING
    assert by_name["inference"].latency_ms > 0
    assert by_name["training"].state is HealthState.UNREACHABLE
    assert by_name["training"].problem == "the training service does not answer at 127.0.0.1:1"


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a\nb", " a", "é"])
async def test_request_ids_that_no_header_can_hold_are_refused(client, fake, request_id):
    with pytest.raises(InvalidRequestError, match="request_id"):
        await client.generate("Hi", request_id=request_id)
    assert not fake.seen
