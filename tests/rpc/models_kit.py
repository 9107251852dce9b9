"""A ModelService of its own over a data directory: the engine that does nothing, sizes as a test says, folders in one
root. What a test opens again over the same directory has restarted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry
from tests.e2e.tiny_model import write_tiny_model

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.inference.v1 import model_service_pb2_grpc as model_grpc
from slipstream.type.v1 import generation_pb2
from slipstream_server.config import ListenConfig
from slipstream_server.inference.budget import MemoryBudget
from slipstream_server.inference.calls import GenerateCall, StoppingChoice, TextPrompt
from slipstream_server.inference.fetching import ModelFetcher
from slipstream_server.inference.front import AdapterResolver, FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.model_loads import ModelLoads
from slipstream_server.inference.model_records import ModelRecords
from slipstream_server.inference.plans import ServingDefaults
from slipstream_server.inference.room import DeviceRoom
from slipstream_server.inference.streams import GenerationStream
from slipstream_server.inference.supervisor import RestartPolicy
from slipstream_server.inference.tables import SCHEMA
from slipstream_server.models.hub import HubAccess
from slipstream_server.models.sources import SourceOptions
from slipstream_server.rpc.inference.model_rooms import ModelFolders, model_rooms
from slipstream_server.rpc.inference.models import ModelServicer
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount, open_server
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate

CPU_BYTES = 100
SIZE = 40
"""What a model takes where a test does not say otherwise: two fit, three do not."""
MODEL = pb2.Model


@dataclass
class ModelService:
    """A running service."""

    stub: Any
    inference: Any
    front: InferenceFront
    loads: ModelLoads
    root: Path
    sizes: dict[str, int]
    address: str
    registry: CollectorRegistry

    async def load(self, name: str, **fields: Any) -> pb2.Model:
        return await self.stub.LoadModel(pb2.LoadModelRequest(name=name, **fields))

    async def get(self, name: str) -> pb2.Model:
        return await self.stub.GetModel(pb2.GetModelRequest(name=name))

    async def unload(self, name: str, **fields: Any) -> pb2.Model:
        return await self.stub.UnloadModel(pb2.UnloadModelRequest(name=name, **fields))

    async def reached(self, name: str, *states: int, timeout_s: float = 60.0) -> pb2.Model:
        """The model once it is in one of these states (READY), by WatchModels."""
        wanted = states or (MODEL.STATE_READY,)
        call = self.stub.WatchModels(pb2.WatchModelsRequest(names=[name]), timeout=timeout_s)
        try:
            async for event in call:
                if event.WhichOneof("event") == "model" and event.model.state in wanted:
                    return event.model
        finally:
            call.cancel()
        raise AssertionError("the watch ended")

    async def loaded(self, name: str, **fields: Any) -> pb2.Model:
        await self.load(name, **fields)
        return await self.reached(name)

    async def states(self) -> dict[str, str]:
        models = (await self.stub.ListModels(pb2.ListModelsRequest())).models
        return {model.name.partition("/")[2]: MODEL.State.Name(model.state)[6:] for model in models}


def folder(root: Path, name: str, **generation: object) -> Path:
    """A model folder in the root."""
    (root / name).mkdir(parents=True, exist_ok=True)
    return write_tiny_model(root / name, **generation)


def edit_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


@asynccontextmanager
async def model_service(
    data: Path,
    *,
    at_start: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    budget_bytes: int = CPU_BYTES,
    defaults: ServingDefaults | None = None,
    reserve: Callable[[Mapping[str, int]], None] = lambda total: None,
    resolve_adapter: AdapterResolver | None = None,
) -> AsyncIterator[ModelService]:
    """Started, restoring, answering on a port of its own."""
    root = data / "root"
    root.mkdir(parents=True, exist_ok=True)
    known_sizes = dict(sizes or {})

    def measure(plan: ModelPlan, capacity: Mapping[str, int]) -> dict[str, int]:
        return {"cpu": known_sizes.get(plan.name, SIZE)}

    registry = CollectorRegistry()
    restart = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05)
    front = InferenceFront(FrontConfig(restart=restart), registry=registry)
    database = Database(DatabaseConfig.sqlite(data / "inference.db"))
    await migrate(database, SCHEMA)
    model_records = ModelRecords(database)
    room = DeviceRoom(
        front, model_records, capacity={"cpu": 2**40}, budget=MemoryBudget({"cpu": budget_bytes}),
        reserve=reserve, measure=measure,
    )  # fmt: skip
    options = SourceOptions(cache_root=data / "cache", hub=HubAccess(is_offline=True, cache_folder=data / "hub"))
    fetcher = ModelFetcher(options, roots=(root,), own_root=data / "own")
    serving = defaults or ServingDefaults(batching="null", threads=1)
    loads = ModelLoads(front, model_records, fetcher, room, serving)
    places = ModelFolders(options=options, roots=(root,), own_root=data / "own", exports=data / "exports")
    rooms = model_rooms(front, model_records, room, places, serving, resolve_adapter)
    mounts = [
        Mount(model_grpc.add_ModelServiceServicer_to_server, ModelServicer(front, loads, rooms)),
        Mount(inference_grpc.add_InferenceServiceServicer_to_server, InferenceServicer(front)),
    ]
    await front.start()
    running: list[asyncio.Task[None]] = []
    try:
        await loads.begin(at_start or {})
        running = [asyncio.create_task(loads.run()), asyncio.create_task(rooms.run())]
        async with open_server(mounts, ListenConfig()) as server:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                yield ModelService(
                    stub=model_grpc.ModelServiceStub(channel),
                    inference=inference_grpc.InferenceServiceStub(channel),
                    front=front,
                    loads=loads,
                    root=root,
                    sizes=known_sizes,
                    address=f"127.0.0.1:{server.port}",
                    registry=registry,
                )
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await front.close()
        await database.close()


def error_info(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Code and reason."""
    return error.code().name, _info(error).reason


def error_metadata(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return dict(_info(error).metadata)


def retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    """What RetryInfo says; None where there is none."""
    retry = _detail(error, error_details_pb2.RetryInfo())
    return None if retry is None else retry.retry_delay.ToTimedelta().total_seconds()


def _info(error: grpc.aio.AioRpcError) -> Any:
    info = _detail(error, error_details_pb2.ErrorInfo())
    assert info is not None
    return info


def _detail(error: grpc.aio.AioRpcError, empty: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    return empty if any(detail.Unpack(empty) for detail in status.details) else None


def generate(service: ModelService, model: str, num_tokens: int = 3) -> Awaitable[inference_pb2.GenerateResponse]:
    stopping = generation_pb2.StoppingOptions(max_new_tokens=num_tokens)
    return service.inference.Generate(inference_pb2.GenerateRequest(model=model, text="hello", stopping=stopping))


def held_open(service: ModelService, model: str) -> Awaitable[GenerationStream]:
    """A request whose answer nobody has read: it keeps its model busy."""
    call = GenerateCall(prompt=TextPrompt(text="hello"), model=model, stopping=StoppingChoice(max_new_tokens=2))
    return service.front.open(call)
