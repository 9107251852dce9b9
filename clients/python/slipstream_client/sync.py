"""The client for code without an event loop: the asynchronous one, run on a thread of its own.

Any number of threads may share it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import SlipstreamClientError
from slipstream_client.models import Model
from slipstream_client.options import CallOptions, CompleteOptions, CountOptions, GenerateOptions, Message, Prompt
from slipstream_client.results import (
    ChatCompletion,
    ChatDelta,
    Detokenization,
    FinishReason,
    Generation,
    GenerationDelta,
    ServiceHealth,
    TokenCount,
    Tokenization,
    Usage,
)
from slipstream_client.streams import AnswerStream

Result = TypeVar("Result")
Delta = TypeVar("Delta")


class LoopThread:
    """An event loop on a daemon thread, which runs coroutines for other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="slipstream-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` on the loop and wait for it. Interrupting the wait (Ctrl-C) cancels the work."""
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            work.close()
            raise SlipstreamClientError(
                "the client is closed" if not self._thread.is_alive() else "called on its own loop"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Stop the loop and its thread; further calls of ``stop`` change nothing."""
        if self._thread.is_alive():
            self.run(self._loop.shutdown_asyncgens())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class SyncAnswerStream(Generic[Delta]):
    """``AnswerStream`` for a plain ``for``.

    One thread at a time; leaving the loop early cancels the call on the server.
    """

    def __init__(self, stream: AnswerStream[Delta], thread: LoopThread) -> None:
        self._stream = stream
        self._thread = thread

    def __iter__(self) -> Iterator[Delta]:
        try:
            while True:
                step = _next(self._stream)
                delta = self._thread.run(step)
                if delta is None:
                    return
                yield delta
        finally:
            self.close()

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


async def _next(stream: AnswerStream[Delta]) -> Delta | None:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        return None


class SyncModels:
    """``Models`` for code without an event loop."""

    def __init__(self, client: SlipstreamClient, thread: LoopThread) -> None:
        self._models = client.models
        self._thread = thread

    def list(self, *, task: str = "", **call: Unpack[CallOptions]) -> list[Model]:
        return self._thread.run(self._models.list(task=task, **call))

    def get(self, name: str, **call: Unpack[CallOptions]) -> Model:
        return self._thread.run(self._models.get(name, **call))


class SyncSlipstreamClient:
    """``SlipstreamClient`` for code without an event loop: the same arguments, the same results.

    Use it with ``with``, or ``close`` it.
    """

    def __init__(self, address: str | None = None, **settings: Any) -> None:
        # Made here, on the caller's thread, so that bad settings raise here; its channels open on the loop's thread.
        self.client = SlipstreamClient(address, **settings)
        self._thread = LoopThread()
        self.models = SyncModels(self.client, self._thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; calls of other threads are cancelled."""
        self._thread.run(self.client.close())
        self._thread.stop()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        return self._thread.run(self.client.generate(prompt, **options))

    def stream_generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> SyncAnswerStream[GenerationDelta]:
        return SyncAnswerStream(self._thread.run(_called(self.client.stream_generate, prompt, options)), self._thread)

    def complete(self, messages: Sequence[Message], **options: Unpack[CompleteOptions]) -> ChatCompletion:
        return self._thread.run(self.client.complete(messages, **options))

    def stream_complete(
        self, messages: Sequence[Message], **options: Unpack[CompleteOptions]
    ) -> SyncAnswerStream[ChatDelta]:
        return SyncAnswerStream(self._thread.run(_called(self.client.stream_complete, messages, options)), self._thread)

    def tokenize(
        self, text: str, *, model: str = "", add_special_tokens: bool | None = None, **call: Unpack[CallOptions]
    ) -> Tokenization:
        return self._thread.run(self.client.tokenize(text, model=model, add_special_tokens=add_special_tokens, **call))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
        **call: Unpack[CallOptions],
    ) -> Detokenization:
        return self._thread.run(
            self.client.detokenize(token_ids, model=model, skip_special_tokens=skip_special_tokens, **call)
        )

    def count_tokens(self, prompt: str | Sequence[Message], **options: Unpack[CountOptions]) -> TokenCount:
        return self._thread.run(self.client.count_tokens(prompt, **options))

    def health(self, service: str, *, timeout_s: float = 3.0) -> ServiceHealth:
        return self._thread.run(self.client.health(service, timeout_s=timeout_s))

    def status(self, *, timeout_s: float = 3.0) -> list[ServiceHealth]:
        return self._thread.run(self.client.status(timeout_s=timeout_s))


async def _called(method: Any, prompt: Any, options: Any) -> Any:
    """What ``method`` returns, made on the loop's thread, to which its channel then belongs."""
    return method(prompt, **options)
