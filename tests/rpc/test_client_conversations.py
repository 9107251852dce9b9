"""Conversations through the client, against the real chat service before an inference that a test commands."""

import asyncio

import grpc
import pytest
from tests.unit.client.fake_services import Failure, FakeServices, serving, settings_for

from slipstream.chat.v1 import chat_service_pb2_grpc as chat_grpc
from slipstream_client import SlipstreamClient, SyncSlipstreamClient
from slipstream_client.errors import AbortedError, NotFoundError, UnavailableError
from slipstream_server.chat.conversations import Conversations
from slipstream_server.chat.tables import SCHEMA
from slipstream_server.chat.turns import Turns
from slipstream_server.config import ListenConfig
from slipstream_server.rpc.chat.servicer import ChatServicer
from slipstream_server.rpc.chat.upstream import InferenceUpstream
from slipstream_server.rpc.server import Mount, open_server
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate


@pytest.fixture
async def inference():
    return FakeServices()


@pytest.fixture
async def address(inference, tmp_path):
    database = Database(DatabaseConfig.sqlite(tmp_path / "chat.db"))
    await migrate(database, SCHEMA)
    conversations = Conversations(database)
    async with serving(inference) as upstream, grpc.aio.insecure_channel(upstream) as channel:
        servicer = ChatServicer(InferenceUpstream(channel), conversations, Turns(database, conversations))
        mount = Mount(chat_grpc.add_ChatServiceServicer_to_server, servicer)
        async with open_server([mount], ListenConfig()) as server:
            yield f"127.0.0.1:{server.port}"
    await database.close()


@pytest.fixture
async def client(address):
    async with SlipstreamClient(settings=settings_for(address)) as connected:
        yield connected


async def test_create_read_change_and_delete(client):
    made = await client.conversations.create("c1", title="Printer", adapter="desk@live", metadata={"user": "7"})
    assert (made.id, made.title, made.adapter, dict(made.metadata)) == ("c1", "Printer", "desk@live", {"user": "7"})
    changed = await client.conversations.update("c1", adapter="", title="Paper", etag=made.etag)
    assert (changed.title, changed.adapter, dict(changed.metadata)) == ("Paper", "", {"user": "7"})
    with pytest.raises(AbortedError):
        await client.conversations.update("c1", title="Ink", etag=made.etag)
    await client.conversations.create("c2")
    assert {known.id for known in await client.conversations.list()} == {"c1", "c2"}
    assert len(await client.conversations.list(limit=1)) == 1
    await client.conversations.delete("c1")
    with pytest.raises(NotFoundError):
        await client.conversations.get("c1")


async def test_a_turn_is_stored(client, inference):
    await client.conversations.create("c1", system_message="Be brief")
    turn = await client.conversations.send("c1", "Hi", max_new_tokens=5, temperature=0)
    assert (turn.text, turn.message.text) == ("Hello there!", "Hi")
    assert (turn.reply.usage.completion_tokens, turn.reply.state) == (3, "complete")
    stored = await client.conversations.messages("c1")
    assert [(message.message.role, message.text) for message in stored] == [
        ("user", "Hi"),
        ("assistant", "Hello there!"),
    ]
    assert (await client.conversations.message(stored[1].name)).sequence == 2
    request = inference.seen[0].request
    assert (request.stopping.max_new_tokens, request.chat.messages[0].content) == (5, "Be brief")
    with pytest.raises(TypeError, match="'model'"):
        await client.conversations.send("c1", "Hi", model="other")


async def test_a_streamed_turn_knows_what_was_stored(client):
    await client.conversations.create("c1")
    stream = client.conversations.stream_message("c1", {"role": "user", "content": "Hi"})
    assert [delta.text async for delta in stream if delta.text] == ["Hello", " there", "!"]
    assert (stream.message.text, stream.reply.text, stream.reply_name) == ("Hi", "Hello there!", stream.reply.name)
    assert (stream.text, stream.usage.completion_tokens, stream.model) == ("Hello there!", 3, "models/tiny")


async def test_a_repeated_turn_is_not_added_again(client, inference):
    await client.conversations.create("c1")
    inference.failures.append(Failure(code=grpc.StatusCode.UNAVAILABLE, reason="WORKER_DIED", after_deltas=2))
    stream = client.conversations.stream_message("c1", "Hi")
    with pytest.raises(UnavailableError):
        await stream.read_all()
    cut = await client.conversations.messages("c1")
    assert [(message.text, message.state) for message in cut] == [("Hi", "complete"), ("Hello there", "incomplete")]
    again = client.conversations.stream_message("c1", "Hi", request_id=stream.request_id)
    assert await again.read_all() == "Hello there!"
    once_more = await client.conversations.send("c1", "Hi", request_id=stream.request_id)
    assert once_more.text == "Hello there!"
    stored = await client.conversations.messages("c1")
    assert [(message.text, message.state) for message in stored] == [("Hi", "complete"), ("Hello there!", "complete")]
    assert len(inference.seen) == 2


async def test_without_an_event_loop(address):
    def use():
        with SyncSlipstreamClient(settings=settings_for(address)) as client:
            name = client.conversations.create().name
            with client.conversations.stream_message(name, "Hi") as stream:
                text = "".join(delta.text for delta in stream)
            return text, stream.reply.text, len(client.conversations.messages(name))

    assert await asyncio.to_thread(use) == ("Hello there!", "Hello there!", 2)
