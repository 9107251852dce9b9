"""The facade for code without an event loop."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.unit.client.fake_services import ServerThread, settings_for

from slipstream_client import SlipstreamClientError, SyncSlipstreamClient


@pytest.fixture
def server():
    with ServerThread() as running:
        yield running


@pytest.fixture
def client(server):
    with SyncSlipstreamClient(settings=settings_for(server.address)) as connected:
        yield connected


def test_calls_from_several_threads(client, server):
    def one(number: int) -> str:
        streamed = "".join(delta.text for delta in client.stream_generate(f"prompt {number}"))
        return streamed + client.generate(f"prompt {number}").text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(one, range(40)))
    assert texts == ["Hello there!" * 2] * 40
    assert len({seen.request.text for seen in server.fake.seen}) == 40


def test_leaving_a_stream_cancels_on_the_server(client, server):
    server.fake.hang_after_deltas = 1
    stream = client.stream_complete([{"role": "user", "content": "Hi"}])
    for _ in stream:
        break
    server.wait_cancelled()
    assert stream.text == "Hello"


def test_outcome_models_and_health(client):
    stream = client.stream_generate("Hi")
    assert stream.read_all() == "Hello there!"
    assert stream.usage.prompt_tokens == 5
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.tokenize("ab").ids == (0, 1)
    assert {health.state for health in client.status()} == {"serving"}


def test_a_closed_client_says_so(server):
    client = SyncSlipstreamClient(settings=settings_for(server.address))
    client.close()
    with pytest.raises(SlipstreamClientError, match="closed"):
        client.generate("Hi")
