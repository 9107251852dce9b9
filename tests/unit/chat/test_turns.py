"""Turns: what is stored when an answer is complete, cut short, refused, repeated, or its writer dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from slipstream_server.chat.conversations import Conversation, Conversations, ConversationSettings
from slipstream_server.chat.tables import SCHEMA, MessageRow, MessageState
from slipstream_server.chat.turns import (
    LEASE_S,
    AnswerDelta,
    AnswerEvent,
    AnswerFinished,
    AnswerStarted,
    Said,
    TurnEvent,
    TurnFinished,
    TurnRunning,
    Turns,
)
from slipstream_server.errors import ConversationNotFound, QueueFull, RequestIdReused, WorkerDied
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import drift, migrate
from slipstream_server.storage.request_records import RequestKey

ADA, BOB = "ada", "bob"
HELLO = Said(role="user", content="Hello?")


class Model:
    """A scripted model: says its words, then ends, fails or waits."""

    def __init__(self, *words: str, failure: Exception | None = None, waits: bool = False) -> None:
        self.words = words
        self.failure = failure
        self.waits = waits
        self.histories: list[list[tuple[str, str]]] = []
        self.is_closed = False
        self.is_waiting = asyncio.Event()

    async def answer(self, conversation: Conversation, history: Sequence[Said]) -> AsyncGenerator[AnswerEvent, None]:
        self.histories.append([(said.role, said.content) for said in history])
        if self.failure is not None and not self.words:
            raise self.failure
        try:
            yield AnswerStarted(model="models/m", adapter_version="adapters/a/versions/v1")
            for word in self.words:
                yield AnswerDelta(text=word)
            if self.failure is not None:
                raise self.failure
            if self.waits:
                self.is_waiting.set()
                await asyncio.Event().wait()
            yield AnswerFinished(
                finish_reason="eos_token", prompt_tokens=5, completion_tokens=2, cached_prompt_tokens=0
            )
        finally:
            self.is_closed = True


class Chat:
    """A database with one conversation of Ada's."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.conversations = Conversations(database)
        self.turns = Turns(database, self.conversations)

    async def say(self, model: Model, question: Said = HELLO, key: RequestKey | None = None) -> list[TurnEvent]:
        return [event async for event in self.turns.run(ADA, "talk", question, model.answer, key)]

    async def stored(self) -> list[tuple[str, str, str]]:
        page = await self.conversations.messages(ADA, "talk", 0, "")
        return [(row.role, row.content, row.state) for row in page.items]


@pytest.fixture
async def chat(tmp_path: Path) -> AsyncIterator[Chat]:
    database = Database(DatabaseConfig.sqlite(tmp_path / "chat.db"))
    await migrate(database, SCHEMA)
    chat = Chat(database)
    await chat.conversations.create(ADA, ConversationSettings(), conversation_id="talk")
    yield chat
    await database.close()


def key_of(request_id: str, request: bytes = b"same") -> RequestKey:
    return RequestKey.of(owner=ADA, method="SendMessage", request_id=request_id, request=request)


async def test_the_revisions_make_what_the_tables_declare(chat: Chat) -> None:
    assert await drift(chat.database, SCHEMA) == []


async def test_a_turn_is_stored_when_its_end_is_heard(chat: Chat) -> None:
    events = await chat.say(Model("Hi ", "there"))
    finished = events[-1]
    assert isinstance(finished, TurnFinished)
    assert (finished.reply.content, finished.reply.finish_reason) == ("Hi there", "eos_token")
    assert (finished.reply.model, finished.reply.adapter_version) == ("models/m", "adapters/a/versions/v1")
    assert (finished.reply.prompt_tokens, finished.reply.completion_tokens) == (5, 2)
    assert await chat.stored() == [("user", "Hello?", "complete"), ("assistant", "Hi there", "complete")]
    assert (await chat.conversations.get(ADA, "talk")).num_messages == 2


async def test_a_nul_that_the_model_writes_does_not_spoil_the_conversation(chat: Chat) -> None:
    events = await chat.say(Model("one\0", "two"))
    assert [event.text for event in events if isinstance(event, AnswerDelta)] == ["one\ufffd", "two"]
    await chat.say(later := Model("three"))
    assert later.histories == [[("user", "Hello?"), ("assistant", "one\ufffdtwo"), ("user", "Hello?")]]


async def test_the_model_sees_the_whole_conversation(chat: Chat) -> None:
    await chat.say(Model("one"))
    model = Model("two")
    await chat.say(model, Said(role="user", content="And?"))
    assert model.histories == [[("user", "Hello?"), ("assistant", "one"), ("user", "And?")]]


async def test_a_turn_refused_before_it_began_leaves_no_trace(chat: Chat) -> None:
    key = key_of("r1")
    with pytest.raises(QueueFull):
        await chat.say(Model(failure=QueueFull("full")), key=key)
    assert await chat.stored() == []
    assert (await chat.conversations.get(ADA, "talk")).num_messages == 0
    await chat.say(Model("now"), key=key)
    assert [content for _, content, _ in await chat.stored()] == ["Hello?", "now"]


async def test_a_turn_that_fails_midway_is_stored_as_far_as_it_was_sent(chat: Chat) -> None:
    with pytest.raises(WorkerDied):
        await chat.say(Model("Once ", "upon", failure=WorkerDied("gone")))
    assert await chat.stored() == [("user", "Hello?", "complete"), ("assistant", "Once upon", "incomplete")]


async def test_a_reader_that_leaves_cuts_the_turn_short_and_frees_the_model(chat: Chat) -> None:
    model = Model("Once", waits=True)
    async with aclosing(chat.turns.run(ADA, "talk", HELLO, model.answer)) as events:
        async for event in events:
            if isinstance(event, AnswerDelta):
                break
    assert model.is_closed
    assert (await chat.stored())[1] == ("assistant", "Once", "incomplete")


async def test_a_cancelled_turn_is_stored_before_the_cancellation_goes_on(chat: Chat) -> None:
    model = Model("Once", waits=True)
    task = asyncio.create_task(chat.say(model))
    await model.is_waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await chat.stored())[1] == ("assistant", "Once", "incomplete")


async def test_a_repeated_request_gets_the_stored_answer_and_adds_no_turn(chat: Chat) -> None:
    await chat.say(Model("first"), key=key_of("r1"))
    silent = Model("second")
    events = await chat.say(silent, key=key_of("r1"))
    assert isinstance(events[-1], TurnFinished)
    assert events[-1].reply.content == "first"
    assert silent.histories == []
    assert len(await chat.stored()) == 2


async def test_a_repeated_request_whose_turn_was_cut_short_is_answered_in_its_place(chat: Chat) -> None:
    with pytest.raises(WorkerDied):
        await chat.say(Model("half", failure=WorkerDied("gone")), key=key_of("r1"))
    events = await chat.say(Model("whole"), key=key_of("r1"))
    assert isinstance(events[-1], TurnFinished)
    assert events[-1].reply.content == "whole"
    assert await chat.stored() == [("user", "Hello?", "complete"), ("assistant", "whole", "complete")]


async def test_a_request_id_with_another_request_is_refused(chat: Chat) -> None:
    await chat.say(Model("first"), key=key_of("r1"))
    with pytest.raises(RequestIdReused):
        await chat.say(Model("second"), key=key_of("r1", b"other"))
    assert len(await chat.stored()) == 2


async def test_one_turn_at_a_time(chat: Chat) -> None:
    async with aclosing(chat.turns.run(ADA, "talk", HELLO, Model("x", waits=True).answer)) as events:
        await anext(events)
        with pytest.raises(TurnRunning):
            await chat.say(Model("y"))
    assert len(await chat.stored()) == 2


async def test_a_writer_that_has_been_silent_too_long_is_taken_for_dead_and_fenced_off(chat: Chat) -> None:
    model = Model("slow", waits=True)
    async with aclosing(chat.turns.run(ADA, "talk", HELLO, model.answer)) as events:
        await anext(events)
        async with chat.database.write() as session:
            long_ago = utc_now() - timedelta(seconds=LEASE_S + 1)
            await session.execute(update(MessageRow).values(update_time=long_ago))
        await chat.say(Model("next"))
    contents = [(content, state) for _, content, state in await chat.stored()]
    assert contents == [("Hello?", "complete"), ("", "incomplete"), ("Hello?", "complete"), ("next", "complete")]


async def test_a_turn_cut_short_before_any_text_is_left_out_of_the_prompt(chat: Chat) -> None:
    with pytest.raises(WorkerDied):
        await chat.say(Model("", failure=WorkerDied("gone")))
    model = Model("fine")
    await chat.say(model, Said(role="user", content="Again?"))
    assert model.histories == [[("user", "Again?")]]


async def test_recovery_marks_the_turns_of_a_dead_process(chat: Chat) -> None:
    async with aclosing(chat.turns.run(ADA, "talk", HELLO, Model("x", waits=True).answer)) as events:
        await anext(events)
        assert (await chat.stored())[1][2] == MessageState.GENERATING
        assert await Turns(chat.database, chat.conversations).recover() == 1
        assert (await chat.stored())[1][2] == MessageState.INCOMPLETE


async def test_another_owners_conversation_does_not_exist(chat: Chat) -> None:
    with pytest.raises(ConversationNotFound):
        await chat.conversations.get(BOB, "talk")
    with pytest.raises(ConversationNotFound):
        async for _ in chat.turns.run(BOB, "talk", HELLO, Model("x").answer):
            pass
