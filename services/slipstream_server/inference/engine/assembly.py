"""From a worker's configuration to an engine that answers: threads, model, packing, a first step, and the facts of it
all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import torch
import transformers

from slipstream_server.errors import ModelLoadFailed, SlipstreamError
from slipstream_server.inference.engine.adapters import AdapterSlots, NoAdapters
from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.continuous import ContinuousEngine
from slipstream_server.inference.engine.continuous_scheduler import StepLimits
from slipstream_server.inference.engine.core import Engine
from slipstream_server.inference.engine.decode_graphs import CudaRecorder
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.kv_budget import blocks_within, device_memory
from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.packing import pack_linears, packed_bytes
from slipstream_server.inference.engine.padded import PaddedEngine
from slipstream_server.inference.engine.paged_attention import ATTENTION, UnsupportedAttention
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.engine.sequences import blocks_for
from slipstream_server.inference.generation import Failed, Finished, GenerationRequest, Ready, Sampling, Stopping
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.loading import LoadedModel, load_model

logger = logging.getLogger(__name__)

Report = Callable[[float, str], None]

_WARM_UP_ID = -1
_CPU_STEP_TOKENS = 256
_GPU_STEP_TOKENS = 2048
_WARM_UP_TIMEOUT_S = 300.0


def assemble(config: WorkerConfig, report: Report, poll: Callable[[], None]) -> tuple[Engine, Ready]:
    """Load the model and build its engine; raises a SlipstreamError that says why it cannot be."""
    if config.model_folder is None:
        raise ModelLoadFailed("no model folder is given")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    report(0.0, "reading weights")
    loaded = load_model(config.model_folder, config.load)
    report(0.8, "preparing the model")
    packed = pack_linears(loaded.model) if config.packed_linears and loaded.device.type == "cpu" else 0
    traits = Traits.of(loaded.model)
    slots = _slots(loaded.model, config)
    grammars = Grammars(config.model_folder, traits.vocab_size)
    grammars.prepare()
    report(0.9, "first step")
    if config.engine == "continuous":
        try:
            return _continuous(PackedModel(traits), config, slots, grammars, loaded, packed, report)
        except UnsupportedAttention as why:
            logger.warning("the model is served by padded batches: continuous ones do not support %s", why)
            reason = {"batching_reason": f"continuous batching does not support {why}"}
            config = msgspec.structs.replace(config, engine="padded")
            return _padded(config, slots, grammars, poll, loaded), _ready(loaded, config, packed, reason)
    return _padded(config, slots, grammars, poll, loaded), _ready(loaded, config, packed)


def _padded(
    config: WorkerConfig, slots: AdapterSlots, grammars: Grammars, poll: Callable[[], None], loaded: LoadedModel
) -> Engine:
    warm_up(PaddedEngine(loaded.model, config.limits()))
    return PaddedEngine(loaded.model, config.limits(), slots=slots, grammars=grammars, poll=poll)


def _continuous(
    model: PackedModel,
    config: WorkerConfig,
    slots: AdapterSlots,
    grammars: Grammars,
    loaded: LoadedModel,
    num_packed: int,
    report: Report,
) -> tuple[Engine, Ready]:
    step_tokens = config.max_step_tokens or (_CPU_STEP_TOKENS if loaded.device.type == "cpu" else _GPU_STEP_TOKENS)
    limits = StepLimits(max_running=config.max_batch_size, max_step_tokens=step_tokens)
    context_tokens = model.traits.context_tokens or config.max_batch_tokens
    # On a GPU the first step is a full one: what it needs is in use when blocks are counted.
    num_first = 1 if loaded.device.type == "cpu" else max(1, min(step_tokens, context_tokens - 2))
    warm_up(ContinuousEngine(model, limits, num_blocks=blocks_for(num_first + 2)), num_first)
    num_blocks = _num_blocks(model, config, context_tokens)
    engine = ContinuousEngine(
        model,
        limits,
        num_blocks,
        slots=slots,
        grammars=grammars,
        prefix_caching=config.prefix_caching,
        max_draft_tokens=config.max_draft_tokens,
        runs_ahead=loaded.device.type == "cuda",
    )
    is_recorded = loaded.device.type == "cuda" and model.record_decoding(
        CudaRecorder(loaded.device), config.max_batch_size, lambda done: report(0.9 + 0.1 * done, "recording steps")
    )
    facts = {
        "decode_graphs": str(is_recorded).lower(),
        "max_step_tokens": str(step_tokens),
        "kv_capacity_tokens": str(num_blocks * BLOCK_TOKENS),
        "prefix_caching": str(config.prefix_caching).lower(),
        "max_draft_tokens": str(config.max_draft_tokens),
    }
    ready = _ready(loaded, config, num_packed, facts)
    return engine, msgspec.structs.replace(
        ready,
        attention=ATTENTION,
        memory_bytes=ready.memory_bytes + num_blocks * model.block_bytes,
        kv_capacity_tokens=num_blocks * BLOCK_TOKENS,
    )


def _num_blocks(model: PackedModel, config: WorkerConfig, context_tokens: int) -> int:
    """By tokens; on GPUs by what the configured share of them leaves."""
    most_tokens = config.max_batch_size * context_tokens
    devices = model.block_bytes_by_device
    if not config.kv_memory_fraction or any(device.type != "cuda" for device in devices):
        return blocks_for(min(config.max_batch_tokens, most_tokens))
    return blocks_within(
        config.kv_memory_fraction,
        devices,
        device_memory(devices),
        most_blocks=blocks_for(most_tokens),
        least_blocks=blocks_for(min(context_tokens, config.max_batch_tokens)),
    )


def _slots(model: Any, config: WorkerConfig) -> AdapterSlots:
    if not config.adapter_slots:
        return NoAdapters()
    return LoraSlots(model, num_slots=config.adapter_slots, max_rank=config.max_adapter_rank)


def warm_up(engine: Engine, num_prompt_tokens: int = 1) -> None:
    """Generate two tokens after a prompt of so many, so that whatever is allocated or compiled on first use is there,
    and a broken model is found out now.
    """
    request = GenerationRequest(
        id=_WARM_UP_ID,
        prompt_token_ids=(0,) * num_prompt_tokens,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=2),
    )
    engine.submit(request)
    limit = time.monotonic() + _WARM_UP_TIMEOUT_S
    while time.monotonic() < limit:
        for event in engine.step():
            if isinstance(event, Failed):
                raise _warm_up_failure(event)
            if isinstance(event, Finished):
                return
    raise ModelLoadFailed(f"the model did not answer within {_WARM_UP_TIMEOUT_S:.0f} s")


def _warm_up_failure(event: Failed) -> SlipstreamError:
    return ModelLoadFailed(f"the model's first step failed: {event.message}")


def _ready(
    loaded: LoadedModel, config: WorkerConfig, num_packed: int, further: Mapping[str, str] = MappingProxyType({})
) -> Ready:
    return Ready(
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        attention=loaded.attn_implementation,
        batching=config.engine,
        memory_bytes=loaded.memory_bytes + packed_bytes(loaded.model),
        settings={
            "threads": str(torch.get_num_threads()),
            "packed_linears": str(num_packed),
            "max_batch_size": str(config.max_batch_size),
            "max_batch_tokens": str(config.max_batch_tokens),
            "max_queue_delay_ms": f"{config.max_queue_delay_ms:g}",
            "adapter_slots": str(config.adapter_slots),
            "max_adapter_rank": str(config.max_adapter_rank),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            **further,
        },
    )
