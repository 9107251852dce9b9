"""Puts the inference service together: the front, its models, the servicers.

Models are fetched and prepared one after the other on a thread, so that the service answers health and "not ready"
from the first second on.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from pathlib import Path

from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.inference.v1 import model_service_pb2_grpc as model_grpc
from slipstream_server.adapters.fitting import ServingBase
from slipstream_server.config import ConfigError, InferenceConfig, Settings
from slipstream_server.errors import InternalError, ModelNotReady, SlipstreamError
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.expected import RETRY_AFTER_S
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.supervisor import ModelState
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.models.load_options import parse_load_options
from slipstream_server.models.progress import PullProgress
from slipstream_server.models.sources import PreparedModel, resolve
from slipstream_server.resource_names import check_id
from slipstream_server.rpc.inference.adapters import FrontAdapters, front_adapters, known_as, registry_peer
from slipstream_server.rpc.inference.models import ModelServicer
from slipstream_server.rpc.inference.reservation import reserve
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount
from slipstream_server.rpc.service_runner import Service, announce, run_service
from slipstream_server.rpc.telemetry import new_registry
from slipstream_server.storage.device_ledger import DeviceLedger

log = logging.getLogger(__name__)

_NOT_IN_AN_ID = re.compile(r"[^a-z0-9]+")


async def run(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code."""
    config = settings.inference
    wanted = wanted_models(config)
    default_model = config.default_model or next(iter(wanted))
    if default_model not in wanted:
        raise ConfigError([f"inference.default_model: {default_model!r} is not one of {', '.join(wanted)}"])
    registry = new_registry()
    front = InferenceFront(_front_config(settings, default_model), registry=registry)
    async with _adapters(settings, front, wanted) as adapters:
        background: dict[str, Callable[[], Awaitable[None]]] = {
            "front": front.wait_stopped,
            "models": partial(_bring_models, front, wanted, settings),
        }
        if adapters is not None:
            front.use_adapters(adapters.resolve)
            background["adapters"] = adapters.watch.run
        await front.start()
        for name in wanted:
            front.announce(name)
        try:
            return await run_service(
                Service(
                    name="inference", mounts=_mounts(front, default_model), background=background, registry=registry
                ),
                settings.listen("inference"),
                on_serving=lambda server: announce("inference", settings.common.host, server),
            )
        finally:
            await front.close()


def _mounts(front: InferenceFront, default_model: str) -> list[Mount]:
    return [
        Mount(
            inference_grpc.add_InferenceServiceServicer_to_server,
            InferenceServicer(front),  # type: ignore[abstract]  # what it leaves out answers UNIMPLEMENTED
            readiness=partial(_is_ready, front, default_model),
        ),
        Mount(
            model_grpc.add_ModelServiceServicer_to_server,
            ModelServicer(front),  # type: ignore[abstract]
        ),
    ]


def _adapters(
    settings: Settings, front: InferenceFront, wanted: Mapping[str, str]
) -> AbstractAsyncContextManager[FrontAdapters | None]:
    """The adapters of the front's models; None where no registry is configured, or no slots for its adapters."""
    peer = registry_peer(settings)
    if peer is None or not settings.inference.adapter_slots:
        return nullcontext()

    def base_of(model: str) -> ServingBase:
        plan = front.plan(model)
        if plan is None:
            raise ModelNotReady(f"model {model} is being prepared", retry_after_s=RETRY_AFTER_S)
        spec = wanted.get(model, plan.source)
        return ServingBase(
            model=model, folder=plan.folder, known_as=known_as(spec), max_rank=plan.worker.max_adapter_rank
        )

    return front_adapters(peer, settings.common.data_dir / "inference" / "adapters", base_of)


def wanted_models(config: InferenceConfig) -> dict[str, str]:
    """Name -> source of every model to load at start. ConfigError where there is none, or a name twice."""
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
    if not wanted:
        raise ConfigError(["inference.models: no model to serve; give one by --model"])
    return wanted


def _name_of(source: str) -> str:
    """The resource id that a source suggests: ``org/Some.Model@main`` -> ``some-model``."""
    last = Path(source.partition("@")[0].rstrip("/")).name
    return _NOT_IN_AN_ID.sub("-", last.removesuffix(".gguf").lower()).strip("-")[:63].strip("-")


def _front_config(settings: Settings, default_model: str) -> FrontConfig:
    config = settings.inference
    admission = AdmissionLimits(max_requests=config.max_queued_requests, max_prompt_tokens=config.max_queued_tokens)
    return FrontConfig(
        admission=admission, default_model=default_model, write_timeout_s=settings.common.write_timeout_s
    )


async def _is_ready(front: InferenceFront, model: str) -> AsyncIterator[bool]:
    async for statuses in front.subscribe():
        yield any(status.model == model and status.state is ModelState.READY for status in statuses)


async def _bring_models(front: InferenceFront, wanted: dict[str, str], settings: Settings) -> None:
    ledger, plans = DeviceLedger(settings.common.data_dir), []
    for name, source in wanted.items():
        try:
            prepared = await _prepare(front, name, source, settings.inference.tokenizer)
            plans.append(await asyncio.to_thread(_plan, name, prepared, settings))
            await asyncio.to_thread(reserve, ledger, settings.inference, plans)
            front.add_model(plans[-1])
        except SlipstreamError as error:
            log.error("model %s cannot be served: %s", name, error.message)
            front.give_up(name, error)
        except Exception:
            log.exception("model %s cannot be served", name)
            front.give_up(name, InternalError(f"model {name} could not be prepared; the log tells why"))
    await asyncio.Event().wait()


async def _prepare(front: InferenceFront, name: str, source: str, tokenizer: str | None) -> PreparedModel:
    loop = asyncio.get_running_loop()

    def report(progress: PullProgress) -> None:
        fraction = progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0
        loop.call_soon_threadsafe(front.report, name, str(progress.stage), fraction)

    return await asyncio.to_thread(resolve, source, tokenizer=tokenizer, progress=report)


def _plan(name: str, prepared: PreparedModel, settings: Settings) -> ModelPlan:
    config = settings.inference
    load = parse_load_options(
        {
            "device": config.device,
            "dtype": config.dtype,
            "device_map": config.device_map,
            "quantization": config.quantization,
            "attn_implementation": config.attention,
        },
        adapter_folder=prepared.adapter_folder,
    )
    worker = WorkerConfig(
        model_folder=prepared.folder,
        load=load,
        engine="null" if config.batching == "null" else "padded",
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        max_queue_delay_ms=config.max_queue_delay_ms,
        threads=config.threads or 0,
        adapter_slots=config.adapter_slots,
        max_adapter_rank=config.max_adapter_rank,
        log_level=settings.common.log_level,
        log_format=settings.common.log_format,  # type: ignore[arg-type]  # config.py allows no other
    )
    return ModelPlan(
        name=name,
        folder=prepared.folder,
        facts=read_facts(prepared.folder),
        worker=worker,
        source=prepared.source,
        revision=prepared.revision,
    )
