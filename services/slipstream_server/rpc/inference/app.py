"""Puts the inference service together: the front, its models, the servicers.

Models are fetched and prepared in the background, so that the service answers health and "not ready" from the first
second on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.inference.v1 import model_service_pb2_grpc as model_grpc
from slipstream_server.adapters.fitting import ServingBase
from slipstream_server.config import ConfigError, InferenceConfig, Settings
from slipstream_server.errors import InvalidField, ModelNotReady, SlipstreamError
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.budget import MemoryBudget
from slipstream_server.inference.expected import RETRY_AFTER_S
from slipstream_server.inference.fetching import ModelFetcher
from slipstream_server.inference.front import FrontConfig, InferenceFront
from slipstream_server.inference.model_loads import ModelLoads
from slipstream_server.inference.model_records import ModelRecords
from slipstream_server.inference.plans import ServingDefaults
from slipstream_server.inference.room import DeviceRoom
from slipstream_server.inference.supervisor import ModelState
from slipstream_server.inference.tables import SCHEMA
from slipstream_server.models.devices import device_memory
from slipstream_server.models.sources import SourceOptions
from slipstream_server.resource_names import check_id
from slipstream_server.rpc.inference.adapters import FrontAdapters, front_adapters, known_as, registry_peer
from slipstream_server.rpc.inference.model_rooms import ModelFolders, ModelRooms, model_rooms
from slipstream_server.rpc.inference.models import ModelServicer
from slipstream_server.rpc.inference.reservation import budget_bytes, reserving
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount
from slipstream_server.rpc.service_runner import Service, announce, run_service
from slipstream_server.rpc.telemetry import new_registry
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.device_ledger import DeviceLedger
from slipstream_server.storage.migrations import migrate
from slipstream_server.tasks.registry import find_task

_NOT_IN_AN_ID = re.compile(r"[^a-z0-9]+")


async def run(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code."""
    config = settings.inference
    at_start = wanted_models(config)
    default_model = config.default_model or next(iter(at_start), "")
    registry = new_registry()
    front = InferenceFront(_front_config(settings, default_model), registry=registry)
    async with _model_records(settings) as model_records, _adapters(settings, front, model_records) as adapters:
        loads = await _loads(settings, front, model_records)
        rooms = await _rooms(settings, front, loads, adapters)
        background: dict[str, Callable[[], Awaitable[None]]] = {
            "front": front.wait_stopped,
            "models": loads.run,
            "making": rooms.run,
        }
        if adapters is not None:
            front.use_adapters(adapters.resolve)
            background["adapters"] = adapters.watch.run
        await front.start()
        try:
            await loads.begin(at_start)
            if default_model and default_model not in model_records.by_name:
                known = ", ".join(model_records.by_name) or "none"
                raise ConfigError([f"inference.default_model: {default_model!r} is not one of the models: {known}"])
            mounts = _mounts(front, loads, rooms, default_model)
            return await run_service(
                Service(name="inference", mounts=mounts, background=background, registry=registry),
                settings.listen("inference"),
                on_serving=lambda server: announce("inference", settings.common.host, server),
            )
        finally:
            await front.close()


@asynccontextmanager
async def _model_records(settings: Settings) -> AsyncIterator[ModelRecords]:
    """The list of models, its database brought to this build's schema."""
    url = settings.inference.database_url
    file = settings.common.data_dir / "inference" / "inference.db"
    database = Database(DatabaseConfig.sqlite(file) if url is None else DatabaseConfig(dsn=url))
    try:
        await migrate(database, SCHEMA)
        yield ModelRecords(database)
    finally:
        await database.close()


async def _loads(settings: Settings, front: InferenceFront, model_records: ModelRecords) -> ModelLoads:
    config = settings.inference
    capacity = await asyncio.to_thread(device_memory)
    room = DeviceRoom(
        front,
        model_records,
        capacity=capacity,
        budget=MemoryBudget(budget_bytes(config, capacity)),
        reserve=reserving(DeviceLedger(settings.common.data_dir), config, capacity),
    )
    fetcher = ModelFetcher(
        SourceOptions(),
        roots=config.model_roots,
        own_root=_own_root(settings),
        tokenizer=config.tokenizer,
    )
    return ModelLoads(front, model_records, fetcher, room, _defaults(settings))


async def _rooms(
    settings: Settings, front: InferenceFront, loads: ModelLoads, adapters: FrontAdapters | None
) -> ModelRooms:
    places = ModelFolders(
        options=SourceOptions(),
        roots=settings.inference.model_roots,
        own_root=_own_root(settings),
        exports=settings.common.data_dir / "inference" / "exports",
    )
    resolve = None if adapters is None else adapters.resolve
    return await asyncio.to_thread(
        model_rooms, front, loads.model_records, loads.room, places, _defaults(settings), resolve
    )


def _own_root(settings: Settings) -> Path:
    """The models that the service makes; training finds them there."""
    return settings.common.data_dir / "inference" / "models"


def _mounts(front: InferenceFront, loads: ModelLoads, rooms: ModelRooms, default_model: str) -> list[Mount]:
    return [
        Mount(
            inference_grpc.add_InferenceServiceServicer_to_server,
            InferenceServicer(front),
            readiness=partial(_is_ready, front, default_model),
        ),
        Mount(
            model_grpc.add_ModelServiceServicer_to_server,
            ModelServicer(front, loads, rooms),
        ),
    ]


def _adapters(
    settings: Settings, front: InferenceFront, model_records: ModelRecords
) -> AbstractAsyncContextManager[FrontAdapters | None]:
    """The adapters of the front's models; None where no registry is configured, or no slots for its adapters."""
    peer = registry_peer(settings)
    if peer is None or not settings.inference.adapter_slots:
        return nullcontext()

    def base_of(model: str) -> ServingBase:
        plan, record = front.plan(model), model_records.get(model)
        folder = record.known_folder if plan is None else plan.folder
        if folder is None:
            raise ModelNotReady(f"model {model} is being prepared", retry_after_s=RETRY_AFTER_S)
        max_rank = settings.inference.max_adapter_rank if plan is None else plan.worker.max_adapter_rank
        return ServingBase(model=model, folder=folder, known_as=known_as(record.locator), max_rank=max_rank)

    return front_adapters(peer, settings.common.data_dir / "inference" / "adapters", base_of)


def wanted_models(config: InferenceConfig) -> dict[str, str]:
    """Name -> source of every model to load at start. ConfigError where one cannot be named, or two are alike."""
    wanted: dict[str, str] = {}
    for spec in config.models:
        name, equals, source = spec.partition("=")
        if not equals:
            name, source = _name_of(spec), spec
        try:
            check_id(name, "inference.models")
        except SlipstreamError as error:
            raise ConfigError([error.message]) from None
        if name in wanted:
            raise ConfigError([f"inference.models: two models are called {name!r}; name them by NAME=SOURCE"])
        wanted[name] = source
    return wanted


def _name_of(source: str) -> str:
    """The resource id that a source suggests: ``org/Some.Model@main`` -> ``some-model``."""
    last = Path(source.partition("@")[0].rstrip("/")).name
    return _NOT_IN_AN_ID.sub("-", last.removesuffix(".gguf").lower()).strip("-")[:63].strip("-")


def task_models(config: InferenceConfig) -> dict[str, str]:
    """Task id -> model of task requests that name none. ConfigError for what is no TASK=MODEL."""
    found: dict[str, str] = {}
    for pair in config.task_models:
        task, equals, model = pair.partition("=")
        try:
            if not equals:
                raise InvalidField.of("inference.task_models", f"{pair!r} is not TASK=MODEL")
            found[find_task(task, "inference.task_models").spec.id] = check_id(model, "inference.task_models")
        except SlipstreamError as error:
            raise ConfigError([error.message]) from None
    return found


def _front_config(settings: Settings, default_model: str) -> FrontConfig:
    config = settings.inference
    admission = AdmissionLimits(max_requests=config.max_queued_requests, max_prompt_tokens=config.max_queued_tokens)
    return FrontConfig(
        admission=admission,
        default_model=default_model,
        task_models=task_models(config),
        write_timeout_s=settings.common.write_timeout_s,
    )


async def _is_ready(front: InferenceFront, model: str) -> AsyncIterator[bool]:
    """Whether the default model answers; a service without one is ready to be given some."""
    async for statuses in front.subscribe():
        yield not model or any(status.model == model and status.state is ModelState.READY for status in statuses)


def _defaults(settings: Settings) -> ServingDefaults:
    config = settings.inference
    return ServingDefaults(
        device=config.device,
        device_map=config.device_map,
        dtype=config.dtype,
        quantization=config.quantization,
        attention=config.attention,
        batching=config.batching,
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        max_step_tokens=config.max_step_tokens,
        max_draft_tokens=config.max_draft_tokens,
        prefix_caching=config.prefix_caching,
        max_queue_delay_ms=config.max_queue_delay_ms,
        threads=config.threads or 0,
        adapter_slots=config.adapter_slots,
        max_adapter_rank=config.max_adapter_rank,
        memory_fraction=config.memory_fraction,
        log_level=settings.common.log_level,
        log_format=settings.common.log_format,  # type: ignore[arg-type]  # config.py allows no other
    )
