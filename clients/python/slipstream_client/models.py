"""The models of an inference service: ``client.models``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Unpack

from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream_client.connection import checked_request_id
from slipstream_client.errors import ProtocolError, from_status
from slipstream_client.model_making import SERVICE, ModelMaking
from slipstream_client.model_options import LOAD_FIELDS, LoadModelOptions
from slipstream_client.model_results import Model as Model
from slipstream_client.model_results import Progress as Progress
from slipstream_client.options import CallOptions
from slipstream_client.paging import all_pages
from slipstream_client.plain import plain
from slipstream_client.spelling import message_of

SETTLED = frozenset({"ready", "unloaded", "failed"})


class Models(ModelMaking):
    """The models of a service. Names are ids (``smollm2``) or resource names (``models/smollm2``)."""

    async def list(self, *, task: str = "", **call: Unpack[CallOptions]) -> list[Model]:
        """Every model the service knows, by name; with ``task`` only those that can do it."""
        request = model_pb2.ListModelsRequest(task=task)
        return await all_pages(self._connection, SERVICE, self.stub.ListModels, request, _models, **call)

    async def get(self, name: str, **call: Unpack[CallOptions]) -> Model:
        """One model. Raises NotFoundError."""
        request = model_pb2.GetModelRequest(name=name)
        return plain(Model, await self._connection.unary(SERVICE, self.stub.GetModel, request, **call))

    async def load(self, name: str, **options: Unpack[LoadModelOptions]) -> Model:
        """Ask for a model to be made ready, and answer at once; ``wait`` follows it.

        ``source`` says where a new one comes from: a hub id, a catalogue entry, a folder of the service's model roots.
        Without any option a known model is held as it was last. A repeat after a lost connection changes nothing more.
        """
        call, given = _split(options)
        request = model_pb2.LoadModelRequest(name=name, **_head(given))
        if given:
            request.options.CopyFrom(message_of(model_pb2.ModelLoadOptions, "options", given))
        call["request_id"] = request.request_id = checked_request_id(call.get("request_id"))
        return plain(Model, await self._connection.unary(SERVICE, self.stub.LoadModel, request, **call))

    async def unload(
        self,
        name: str,
        *,
        grace_s: float | None = None,
        force: bool = False,
        etag: str = "",
        **call: Unpack[CallOptions],
    ) -> Model:
        """Take a model out of memory; running requests get ``grace_s``. Raises FailedPreconditionError (pinned)."""
        values = {"name": name, "grace": grace_s, "force": force, "etag": etag}
        request = message_of(model_pb2.UnloadModelRequest, "", values)
        return plain(Model, await self._connection.unary(SERVICE, self.stub.UnloadModel, request, **call))

    async def delete(self, name: str, *, etag: str = "", **call: Unpack[CallOptions]) -> None:
        """Forget an unloaded model, and the files that the service made. Raises FailedPreconditionError."""
        request = model_pb2.DeleteModelRequest(name=name, etag=etag)
        await self._connection.unary(SERVICE, self.stub.DeleteModel, request, **call)

    async def wait(
        self, name: str, *, on_change: Callable[[Model], None] = lambda model: None, **call: Unpack[CallOptions]
    ) -> Model:
        """Follow a model until it is ready, or unloaded; ``on_change`` sees every step. Raises why it failed."""
        async with aclosing(self._protos((name,), call)) as protos:
            async for proto in protos:
                model = plain(Model, proto)
                on_change(model)
                if model.state == "failed":
                    raise from_status(proto.error)
                if model.state in SETTLED:
                    return model
        raise ProtocolError(f"the watch of {name} ended before the model was ready")

    async def watch(self, *names: str, **call: Unpack[CallOptions]) -> AsyncGenerator[Model]:
        """Every model as it is now, then again whenever it changes. Deletions are passed over."""
        async with aclosing(self._protos(names, call)) as protos:
            async for proto in protos:
                yield plain(Model, proto)

    async def _protos(self, names: tuple[str, ...], call: CallOptions) -> AsyncGenerator[model_pb2.Model]:
        request = model_pb2.WatchModelsRequest(names=names)
        events = self._connection.stream(SERVICE, self.stub.WatchModels, request, is_answer=_is_any, **call)
        async with aclosing(events):
            async for event in events:
                if event.WhichOneof("event") == "model":
                    yield event.model


def _models(page: model_pb2.ListModelsResponse) -> Iterable[Model]:
    return (plain(Model, proto) for proto in page.models)


def _is_any(event: model_pb2.WatchModelsResponse) -> bool:
    return True


def _split(options: Any) -> tuple[CallOptions, dict[str, Any]]:
    rest = {key: value for key, value in options.items() if value is not None}
    return CallOptions(timeout_s=rest.pop("timeout_s", None), request_id=rest.pop("request_id", None)), rest


def _head(given: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the load options, taken out of ``given``; what is left must be one of them."""
    head: dict[str, Any] = {
        name: given.pop(name) for name in ("source", "revision", "pinned", "validate_only") if name in given
    }
    if unknown := set(given) - LOAD_FIELDS:
        raise TypeError(f"load() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    return head
