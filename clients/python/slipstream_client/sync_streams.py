"""Answers while they come, for a plain ``for``."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from slipstream_client.conversations import ConversationMessage, MessageStream
from slipstream_client.loop_thread import LoopThread
from slipstream_client.results import ChatDelta, FinishReason, Usage
from slipstream_client.streams import AnswerStream

Delta = TypeVar("Delta")


class SyncAnswerStream(Generic[Delta]):
    """``AnswerStream`` for a plain ``for``.

    One thread at a time; leaving the loop early cancels the call on the server.
    """

    def __init__(self, stream: AnswerStream[Delta], thread: LoopThread) -> None:
        self._stream = stream
        self._thread = thread

    def __iter__(self) -> Iterator[Delta]:
        return self._thread.iterate(self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the call, on the server too, if it has not ended."""
        self._thread.run(self._stream.aclose())

    def read_all(self) -> str:
        """Wait for the end; the whole text of the first sequence."""
        return self._thread.run(self._stream.read_all())

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def texts(self) -> dict[int, str]:
        return self._stream.texts

    @property
    def model(self) -> str:
        return self._stream.model

    @property
    def adapter_version(self) -> str:
        return self._stream.adapter_version

    @property
    def usage(self) -> Usage:
        return self._stream.usage

    @property
    def finish_reason(self) -> FinishReason:
        return self._stream.finish_reason

    @property
    def finish_reasons(self) -> dict[int, FinishReason]:
        return self._stream.finish_reasons

    @property
    def request_id(self) -> str:
        return self._stream.request_id


class SyncMessageStream(SyncAnswerStream[ChatDelta]):
    """``MessageStream`` for a plain ``for``."""

    def __init__(self, stream: MessageStream, thread: LoopThread) -> None:
        super().__init__(stream, thread)
        self._turn = stream

    @property
    def message(self) -> ConversationMessage | None:
        return self._turn.message

    @property
    def reply(self) -> ConversationMessage | None:
        return self._turn.reply

    @property
    def reply_name(self) -> str:
        return self._turn.reply_name
