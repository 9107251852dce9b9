"""ModelService: the models of this service as resources. Lives on the event loop; no torch.

What makes models is in ``model_making``, what advises on them in ``model_advice``; this file has what there is, and
loading, unloading and deleting it.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from slipstream.inference.v1 import model_service_pb2
from slipstream.inference.v1 import model_service_pb2_grpc as model_grpc
from slipstream_server.errors import InvalidField
from slipstream_server.inference.front import InferenceFront
from slipstream_server.inference.model_loads import ModelLoads
from slipstream_server.resource_names import ModelName
from slipstream_server.rpc.inference.convert import model_id
from slipstream_server.rpc.inference.model_advice import ModelAdvice
from slipstream_server.rpc.inference.model_convert import grace_s, load_wish, model_message, required_model_id
from slipstream_server.rpc.inference.model_making import PROGRESS_EVERY_S, ModelMaking, request_key
from slipstream_server.rpc.inference.model_rooms import ModelRooms
from slipstream_server.rpc.request_context import caller
from slipstream_server.storage.pages import PageRequest, encode_token
from slipstream_server.tasks.registry import find_task

Context = grpc.aio.ServicerContext[Any, Any]
Model = model_service_pb2.Model


class ModelServicer(ModelMaking, ModelAdvice, model_grpc.ModelServiceServicer):
    """All methods of ModelService."""

    def __init__(self, front: InferenceFront, loads: ModelLoads, rooms: ModelRooms) -> None:
        self._front = front
        self._loads = loads
        self._making = rooms.making
        self._advice = rooms.advice
        self._replica_id = f"{socket.gethostname()}-{int(time.time())}"

    # Reading.

    async def GetModel(self, request: model_service_pb2.GetModelRequest, context: Context) -> Model:
        return await self._message(model_id(request.name, "name"))

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: Context
    ) -> model_service_pb2.ListModelsResponse:
        query = ("models", ",".join(map(str, sorted(request.states))), request.task)
        task = find_task(request.task).spec.id if request.task else ""
        _check_states(request.states)
        page = PageRequest(query=query, page_size=request.page_size, page_token=request.page_token)
        num_rows, position = page.num_rows(), page.position()
        after = position[0] if position else ""
        models = [model_message(v, self._replica_id) for v in self._loads.states.views() if v.record.id > after]
        wanted = [
            model
            for model in models
            if (not request.states or model.state in request.states) and (not task or task in model.tasks)
        ]
        response = model_service_pb2.ListModelsResponse(models=wanted[:num_rows])
        if len(wanted) > num_rows:
            last = ModelName.parse(wanted[num_rows - 1].name, "name").model
            response.next_page_token = encode_token(query, (last,))
        return response

    async def WatchModels(
        self, request: model_service_pb2.WatchModelsRequest, context: Context
    ) -> AsyncIterator[model_service_pb2.WatchModelsResponse]:
        names = {model_id(name, f"names[{i}]") for i, name in enumerate(request.names)}
        shown = _Shown()
        is_first = True
        async for _ in self._front.subscribe():
            views = [view for view in self._loads.states.views() if not names or view.record.id in names]
            models = {view.record.id: model_message(view, self._replica_id) for view in views}
            for model in shown.news(models):
                yield model_service_pb2.WatchModelsResponse(model=model)
            if is_first:
                end = model_service_pb2.ModelsSnapshotEnd(model_count=len(models))
                yield model_service_pb2.WatchModelsResponse(snapshot_end=end)
                is_first = False
            for name in shown.gone(models):
                yield model_service_pb2.WatchModelsResponse(deleted_model=str(ModelName(name)))

    async def _message(self, model: str) -> Model:
        return model_message(self._loads.states.view(model), self._replica_id)

    # Loading.

    async def LoadModel(self, request: model_service_pb2.LoadModelRequest, context: Context) -> Model:
        wish = load_wish(request, caller())
        key = None if request.validate_only else request_key("LoadModel", request.request_id, request)
        view = await self._loads.load(wish, key=key, validate_only=request.validate_only)
        return model_message(view, self._replica_id)

    async def UnloadModel(self, request: model_service_pb2.UnloadModelRequest, context: Context) -> Model:
        view = await self._loads.unload(
            required_model_id(request.name), grace_s=grace_s(request), force=request.force, etag=request.etag
        )
        return model_message(view, self._replica_id)

    async def DeleteModel(self, request: model_service_pb2.DeleteModelRequest, context: Context) -> Empty:
        await self._loads.delete(required_model_id(request.name), etag=request.etag)
        return Empty()


class _Shown:
    """What one watcher has been shown. Progress alone is news at most twice a second for each model."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._times_s: dict[str, float] = {}

    def news(self, models: dict[str, Model]) -> list[Model]:
        now_s = asyncio.get_running_loop().time()
        found = []
        for name, model in models.items():
            before = self._models.get(name)
            is_news = before is None or _without_progress(before) != _without_progress(model)
            is_due = now_s - self._times_s.get(name, 0.0) >= PROGRESS_EVERY_S
            if is_news or (before is not None and before.progress != model.progress and is_due):
                self._models[name], self._times_s[name] = model, now_s
                found.append(model)
        return found

    def gone(self, models: dict[str, Model]) -> list[str]:
        names = sorted(self._models.keys() - models.keys())
        for name in names:
            del self._models[name], self._times_s[name]
        return names


def _without_progress(model: Model) -> Model:
    """A model but for what changes all the time."""
    plain = Model()
    plain.CopyFrom(model)
    plain.ClearField("progress")
    for replica in plain.replica_statuses:
        replica.ClearField("report_time")
    return plain


def _check_states(states: Iterable[int]) -> None:
    """Raise InvalidField for a number that is no state."""
    known = {number: name for name, number in Model.State.items() if number}
    for place, state in enumerate(states):
        if state not in known:
            raise InvalidField.of(f"states[{place}]", f"{state} is no state; allowed: {', '.join(known.values())}")
