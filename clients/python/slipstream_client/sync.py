"""The client for code without an event loop: the asynchronous one, run on a thread of its own.

Any number of threads may share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from slipstream_client.client import SlipstreamClient
from slipstream_client.loop_thread import LoopThread
from slipstream_client.options import CallOptions, CompleteOptions, CountOptions, GenerateOptions, Message, Prompt
from slipstream_client.results import (
    ChatCompletion,
    ChatDelta,
    Detokenization,
    Generation,
    GenerationDelta,
    ServiceHealth,
    TokenCount,
    Tokenization,
)
from slipstream_client.sync_nouns import (
    SyncAdapters,
    SyncConversations,
    SyncDatasets,
    SyncJobs,
    SyncModels,
    SyncTasks,
)
from slipstream_client.sync_streams import SyncAnswerStream
from slipstream_client.task_results import TaskAnswer, TaskResult


class SyncSlipstreamClient:
    """``SlipstreamClient`` for code without an event loop: the same arguments, the same results.

    Use it with ``with``, or ``close`` it.
    """

    def __init__(self, address: str | None = None, **settings: Any) -> None:
        # Made here, on the caller's thread, so that bad settings raise here; its channels open on the loop's thread.
        self.client = SlipstreamClient(address, **settings)
        self._thread = LoopThread()
        self.models = SyncModels(self.client.models, self._thread)
        self.datasets = SyncDatasets(self.client.datasets, self._thread)
        self.jobs = SyncJobs(self.client.jobs, self._thread)
        self.adapters = SyncAdapters(self.client.adapters, self._thread)
        self.conversations = SyncConversations(self.client.conversations, self._thread)
        self.tasks = SyncTasks(self.client.tasks, self._thread)

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

    def run_task(self, task: str, inputs: Any, **options: Any) -> TaskAnswer:
        return self.tasks.run(task, inputs, **options)

    def stream_task(self, task: str, inputs: Any, **options: Any) -> Iterator[TaskResult]:
        return self.tasks.stream(task, inputs, **options)

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
