"""A turn: the question is stored, answered, and the answer stored; it ends in one of three states.

    undone       nothing was begun to be answered (a bad request, a full queue): the turn leaves no trace
    complete     question and answer are stored when the caller hears of it
    incomplete   cut short by cancellation, deadline or a fault: what had been sent is stored as far as it was

One turn at a time in a conversation. The answer's text is saved every ``SAVE_INTERVAL_S`` while it grows, which is also
its writer's sign of life: a turn whose writer has been silent for ``LEASE_S`` is taken for dead by the next turn, and
fenced off, for the writer's id is part of every update. A repeated request_id finds its turn again: a complete one is
returned, an incomplete one is answered anew in its place.

Knows neither gRPC nor the model: ``Answer`` is handed in. Lives on the service's event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.chat.conversations import Conversation, Conversations, find, touch
from slipstream_server.chat.tables import REQUESTS, ConversationRow, MessageRow, MessageState
from slipstream_server.errors import Aborted, FencedOut, MessageNotFound
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.request_records import RequestKey

SAVE_INTERVAL_S = 1.0
LEASE_S = 30.0
RETRY_AFTER_S = 1.0


class TurnRunning(Aborted):
    """Another turn of the conversation is being answered."""

    reason = "WRONG_STATE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A message as it was said. ``extra`` is opaque to this room."""

    role: str
    content: str
    extra: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStarted:
    """First: who answers."""

    model: str
    adapter_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerDelta:
    """New text; ``payload`` is passed through to the caller untouched."""

    text: str
    payload: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFinished:
    """Last: how it ended and what it cost."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


AnswerEvent = AnswerStarted | AnswerDelta | AnswerFinished
Answer = Callable[[Conversation, Sequence[Said]], AsyncGenerator[AnswerEvent, None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStarted:
    """The question is stored and the answer has begun."""

    question: MessageRow
    reply_sequence: int
    model: str
    adapter_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFinished:
    """Both are stored."""

    question: MessageRow
    reply: MessageRow


TurnEvent = TurnStarted | AnswerDelta | TurnFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a turn stands, and the token of who writes it."""

    conversation: str
    question_sequence: int
    writer: str

    @property
    def reply_sequence(self) -> int:
        return self.question_sequence + 1


class Turns:
    """Runs turns over one database."""

    def __init__(self, database: Database, conversations: Conversations) -> None:
        self._database = database
        self._conversations = conversations

    async def recover(self) -> int:
        """At start: turns whose writers are gone become incomplete; returns how many. SQLite has no other writers."""
        async with self._database.write() as session:
            lease = timedelta() if self._database.is_sqlite else timedelta(seconds=LEASE_S)
            found = select(MessageRow).where(
                MessageRow.state == MessageState.GENERATING, MessageRow.update_time <= utc_now() - lease
            )
            rows = (await session.scalars(found)).all()
            for row in rows:
                _abandon(row)
            return len(rows)

    async def run(
        self, owner: str, conversation_id: str, question: Said, answer: Answer, key: RequestKey | None = None
    ) -> AsyncGenerator[TurnEvent, None]:
        """One turn. Closing the iteration early cuts the turn short.

        Raises ConversationNotFound, TurnRunning, RequestIdReused, FencedOut where another writer took over, and
        whatever ``answer`` raises.
        """
        place = await self._begin(owner, conversation_id, question, key)
        if place.writer == "":
            async for event in self._replay(owner, place):
                yield event
            return
        recorder = _Recorder(self._database, place)
        try:
            async with aclosing(self._answered(owner, place, answer, recorder)) as events:
                async for event in events:
                    yield event
        finally:
            await _to_the_end(recorder.settle(key))

    async def _answered(
        self, owner: str, place: _Place, answer: Answer, recorder: _Recorder
    ) -> AsyncGenerator[TurnEvent, None]:
        conversation = await self._conversations.get(owner, place.conversation)
        question = await self._conversations.message(owner, place.conversation, place.question_sequence)
        history = await self._history(place)
        async with aclosing(answer(conversation, history)) as events:
            async for event in events:
                match event:
                    case AnswerStarted():
                        recorder.started = event
                        yield TurnStarted(
                            question=question,
                            reply_sequence=place.reply_sequence,
                            model=event.model,
                            adapter_version=event.adapter_version,
                        )
                    case AnswerDelta():
                        # A model may write NUL, which no database keeps and no question may hold.
                        kept = replace(event, text=event.text.replace("\0", "\ufffd"))
                        await recorder.add(kept.text)
                        yield kept
                    case AnswerFinished():
                        await recorder.finish(event)
        reply = await self._conversations.message(owner, place.conversation, place.reply_sequence)
        yield TurnFinished(question=question, reply=reply)

    async def _begin(self, owner: str, conversation_id: str, question: Said, key: RequestKey | None) -> _Place:
        """Store the question and an empty answer, or find a repeated request's turn: writer "" says it is complete."""
        writer = secrets.token_hex(8)
        async with self._database.write() as session:
            conversation = await find(session, owner, conversation_id)
            known = None if key is None else await REQUESTS.get_or_claim(session, key)
            if known is not None and known.response is not None:
                return await _resume(session, conversation, int(known.response), writer)
            await _refuse_second_turn(session, conversation)
            sequence = conversation.last_sequence + 1
            now = utc_now()
            common = {"conversation": conversation.id, "owner": owner, "create_time": now, "update_time": now}
            session.add(
                MessageRow(
                    **common,
                    sequence=sequence,
                    state=MessageState.COMPLETE,
                    role=question.role,
                    content=question.content,
                    extra=question.extra,
                )
            )
            session.add(
                MessageRow(
                    **common,
                    sequence=sequence + 1,
                    state=MessageState.GENERATING,
                    role="assistant",
                    content="",
                    extra=b"",
                    writer=writer,
                )
            )
            conversation.last_sequence = sequence + 1
            conversation.num_messages += 2
            touch(conversation)
            if key is not None:
                await REQUESTS.answer(session, key, str(sequence).encode())
        return _Place(conversation=conversation_id, question_sequence=sequence, writer=writer)

    async def _replay(self, owner: str, place: _Place) -> AsyncIterator[TurnEvent]:
        question = await self._conversations.message(owner, place.conversation, place.question_sequence)
        reply = await self._conversations.message(owner, place.conversation, place.reply_sequence)
        yield TurnStarted(
            question=question,
            reply_sequence=reply.sequence,
            model=reply.model,
            adapter_version=reply.adapter_version,
        )
        yield AnswerDelta(text=reply.content)
        yield TurnFinished(question=question, reply=reply)

    async def _history(self, place: _Place) -> list[Said]:
        """The conversation up to the question. A turn cut short before any text is left out, question and all."""
        rows = select(MessageRow).where(
            MessageRow.conversation == place.conversation, MessageRow.sequence <= place.question_sequence
        )
        async with self._database.read() as session:
            messages = (await session.scalars(rows.order_by(MessageRow.sequence))).all()
        silent = {m.sequence for m in messages if m.state != MessageState.COMPLETE and not m.content}
        return [
            Said(role=m.role, content=m.content, extra=m.extra)
            for m in messages
            if m.sequence not in silent and m.sequence + 1 not in silent
        ]


class _Recorder:
    """Keeps the stored answer up with the one being sent."""

    def __init__(self, database: Database, place: _Place) -> None:
        self._database = database
        self._place = place
        self._texts: list[str] = []
        self._saved_at_s = time.monotonic()
        self._finished = False
        self.started: AnswerStarted | None = None

    async def add(self, text: str) -> None:
        self._texts.append(text)
        if time.monotonic() - self._saved_at_s >= SAVE_INTERVAL_S:
            await self._save(state=MessageState.GENERATING)
            self._saved_at_s = time.monotonic()

    async def finish(self, event: AnswerFinished) -> None:
        await self._save(
            state=MessageState.COMPLETE,
            writer="",
            finish_reason=event.finish_reason,
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            cached_prompt_tokens=event.cached_prompt_tokens,
        )
        self._finished = True

    async def settle(self, key: RequestKey | None) -> None:
        """However the turn ended: an unfinished answer is stored as incomplete, or undone where none was begun."""
        if self._finished:
            return
        if self.started is None:
            await self._undo(key)
            return
        with suppress(FencedOut):  # deleted, or answered by somebody else: nothing of ours is left to settle
            await self._save(state=MessageState.INCOMPLETE, writer="", finish_reason="incomplete")

    async def _save(self, **values: object) -> None:
        if self.started is not None:
            values |= {"model": self.started.model, "adapter_version": self.started.adapter_version}
        async with self._database.write() as session:
            changed = await session.execute(
                update(MessageRow)
                .where(*self._mine())
                .values(content="".join(self._texts), update_time=utc_now(), **values)
            )
            if changed.rowcount == 0:  # type: ignore[attr-defined]
                raise FencedOut("another writer has taken this turn over")

    async def _undo(self, key: RequestKey | None) -> None:
        async with self._database.write() as session:
            row = (await session.scalars(select(MessageRow).where(*self._mine()))).one_or_none()
            conversation = await session.get(ConversationRow, self._place.conversation)
            if row is None or conversation is None:
                return
            await session.execute(
                delete(MessageRow).where(
                    MessageRow.conversation == self._place.conversation,
                    MessageRow.sequence.in_([self._place.question_sequence, self._place.reply_sequence]),
                )
            )
            conversation.num_messages -= 2
            if conversation.last_sequence == self._place.reply_sequence:
                conversation.last_sequence -= 2
            if key is not None:
                await REQUESTS.forget(session, key)

    def _mine(self) -> tuple[ColumnElement[bool], ...]:
        place = self._place
        return (
            MessageRow.conversation == place.conversation,
            MessageRow.sequence == place.reply_sequence,
            MessageRow.writer == place.writer,
        )


async def _resume(session: AsyncSession, conversation: ConversationRow, question_sequence: int, writer: str) -> _Place:
    """The turn of a repeated request: complete as it is, or taken over to be answered anew."""
    reply = await session.get(MessageRow, (conversation.id, question_sequence + 1))
    if reply is not None and reply.state == MessageState.COMPLETE:
        return _Place(conversation=conversation.id, question_sequence=question_sequence, writer="")
    await _refuse_second_turn(session, conversation)
    if reply is None:
        raise MessageNotFound("request_id: its turn was deleted; send the message with a new request_id")
    reply.state, reply.writer, reply.content, reply.update_time = MessageState.GENERATING, writer, "", utc_now()
    touch(conversation)
    return _Place(conversation=conversation.id, question_sequence=question_sequence, writer=writer)


async def _refuse_second_turn(session: AsyncSession, conversation: ConversationRow) -> None:
    running = select(MessageRow).where(
        MessageRow.conversation == conversation.id, MessageRow.state == MessageState.GENERATING
    )
    for row in (await session.scalars(running)).all():
        if row.update_time > utc_now() - timedelta(seconds=LEASE_S):
            raise TurnRunning(
                f"conversation {conversation.id}: a turn is being answered; wait for it, or cancel its call",
                retry_after_s=RETRY_AFTER_S,
            )
        _abandon(row)


def _abandon(row: MessageRow) -> None:
    """An answer whose writer is gone: what it saved stays, and nobody may write to it any more."""
    row.state, row.writer, row.finish_reason = MessageState.INCOMPLETE, "", "incomplete"


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` even while this task is being cancelled, and only then let the cancellation go on."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
