"""The nouns for code without an event loop: the same methods, arguments and results, run on the client's thread."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, Unpack

from slipstream_client import options
from slipstream_client.adapter_versions import AdapterAliases, AdapterVersions
from slipstream_client.adapters import Adapters
from slipstream_client.conversations import Conversations, MessageStream, TurnOptions
from slipstream_client.datasets import Datasets
from slipstream_client.jobs import Jobs
from slipstream_client.loop_thread import LoopThread
from slipstream_client.models import Models
from slipstream_client.sync_streams import SyncMessageStream
from slipstream_client.tasks import Tasks

Noun = TypeVar("Noun")
Result = TypeVar("Result")
Given = ParamSpec("Given")


class SyncNoun(Generic[Noun]):
    """A noun of the asynchronous client, and the thread on which it lives."""

    def __init__(self, noun: Noun, thread: LoopThread) -> None:
        self.noun = noun
        self.thread = thread


def _waited(
    method: Callable[Concatenate[Noun, Given], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[SyncNoun[Noun], Given], Result]:
    """``method``, waited for."""

    def call(self: SyncNoun[Noun], /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        return self.thread.run(_called(method, self.noun, *args, **kwargs))

    call.__doc__ = method.__doc__
    return call


async def _called(
    method: Callable[Concatenate[Noun, Given], Coroutine[Any, Any, Result]],
    noun: Noun,
    *args: Given.args,
    **kwargs: Given.kwargs,
) -> Result:
    """The method is called on the loop's thread too: the channel that it may open belongs there."""
    return await method(noun, *args, **kwargs)


def _iterated(
    method: Callable[Concatenate[Noun, Given], AsyncGenerator[Result]],
) -> Callable[Concatenate[SyncNoun[Noun], Given], Iterator[Result]]:
    """``method``, for a plain ``for``."""

    def call(self: SyncNoun[Noun], /, *args: Given.args, **kwargs: Given.kwargs) -> Iterator[Result]:
        # A generator's body runs on the loop's thread, from its first item on.
        return self.thread.iterate(method(self.noun, *args, **kwargs))

    call.__doc__ = method.__doc__
    return call


class SyncModels(SyncNoun[Models]):
    """``Models``."""

    list = _waited(Models.list)
    get = _waited(Models.get)
    load = _waited(Models.load)
    unload = _waited(Models.unload)
    delete = _waited(Models.delete)
    wait = _waited(Models.wait)
    watch = _iterated(Models.watch)
    create = _waited(Models.create)
    export = _waited(Models.export)
    estimate = _waited(Models.estimate)
    recommend = _waited(Models.recommend)


class SyncDatasets(SyncNoun[Datasets]):
    """``Datasets``."""

    upload = _waited(Datasets.upload)
    wait = _waited(Datasets.wait)
    get = _waited(Datasets.get)
    list = _waited(Datasets.list)
    delete = _waited(Datasets.delete)
    preview = _waited(Datasets.preview)


class SyncJobs(SyncNoun[Jobs]):
    """``Jobs``."""

    create = _waited(Jobs.create)
    get = _waited(Jobs.get)
    list = _waited(Jobs.list)
    cancel = _waited(Jobs.cancel)
    delete = _waited(Jobs.delete)
    checkpoints = _waited(Jobs.checkpoints)
    watch = _iterated(Jobs.watch)


class SyncAdapterVersions(SyncNoun[AdapterVersions]):
    """``AdapterVersions``."""

    get = _waited(AdapterVersions.get)
    list = _waited(AdapterVersions.list)
    delete = _waited(AdapterVersions.delete)


class SyncAdapterAliases(SyncNoun[AdapterAliases]):
    """``AdapterAliases``."""

    get = _waited(AdapterAliases.get)
    list = _waited(AdapterAliases.list)
    set = _waited(AdapterAliases.set)
    roll_back = _waited(AdapterAliases.roll_back)
    delete = _waited(AdapterAliases.delete)


class SyncAdapters(SyncNoun[Adapters]):
    """``Adapters``."""

    create = _waited(Adapters.create)
    get = _waited(Adapters.get)
    list = _waited(Adapters.list)
    delete = _waited(Adapters.delete)
    upload = _waited(Adapters.upload)
    download = _waited(Adapters.download)
    set_active = _waited(Adapters.set_active)
    disable = _waited(Adapters.disable)
    enable = _waited(Adapters.enable)

    @property
    def versions(self) -> SyncAdapterVersions:
        return SyncAdapterVersions(self.noun.versions, self.thread)

    @property
    def aliases(self) -> SyncAdapterAliases:
        return SyncAdapterAliases(self.noun.aliases, self.thread)


class SyncTasks(SyncNoun[Tasks]):
    """``Tasks``."""

    run = _waited(Tasks.run)
    stream = _iterated(Tasks.stream)
    list = _waited(Tasks.list)
    describe = _waited(Tasks.describe)
    classify = _waited(Tasks.classify)
    embed = _waited(Tasks.embed)


class SyncConversations(SyncNoun[Conversations]):
    """``Conversations``."""

    create = _waited(Conversations.create)
    get = _waited(Conversations.get)
    list = _waited(Conversations.list)
    update = _waited(Conversations.update)
    delete = _waited(Conversations.delete)
    messages = _waited(Conversations.messages)
    message = _waited(Conversations.message)
    send = _waited(Conversations.send)

    def stream_message(
        self, name: str, message: str | options.Message, **given: Unpack[TurnOptions]
    ) -> SyncMessageStream:
        """``Conversations.stream_message``."""

        async def begin() -> MessageStream:
            return self.noun.stream_message(name, message, **given)

        return SyncMessageStream(self.thread.run(begin()), self.thread)
