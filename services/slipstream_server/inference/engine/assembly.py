"""From a worker's configuration to an engine that answers: threads, model, packing, a first step, and the facts of it
all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from slipstream_server.errors import ModelLoadFailed, SlipstreamError
from slipstream_server.inference.engine.adapters import AdapterSlots, NoAdapters
from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packing import pack_linears, packed_bytes
from slipstream_server.inference.engine.padded import PaddedEngine
from slipstream_server.inference.generation import Failed, Finished, GenerationRequest, Ready, Sampling, Stopping
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.loading import LoadedModel, load_model

logger = logging.getLogger(__name__)

Report = Callable[[float, str], None]

_WARM_UP_ID = -1
_WARM_UP_TIMEOUT_S = 300.0


def assemble(config: WorkerConfig, report: Report, poll: Callable[[], None]) -> tuple[PaddedEngine, Ready]:
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
    report(0.9, "first step")
    warm_up(PaddedEngine(loaded.model, config.limits()))
    engine = PaddedEngine(loaded.model, config.limits(), slots=_slots(loaded.model, config), poll=poll)
    return engine, _ready(loaded, config, packed)


def _slots(model: Any, config: WorkerConfig) -> AdapterSlots:
    if not config.adapter_slots:
        return NoAdapters()
    return LoraSlots(model, num_slots=config.adapter_slots, max_rank=config.max_adapter_rank)


def warm_up(engine: PaddedEngine) -> None:
    """Generate two tokens, so that whatever is allocated or compiled on first use is there, and a broken model is
    found out now.
    """
    request = GenerationRequest(
        id=_WARM_UP_ID, prompt_token_ids=(0,), sampling=Sampling(), stopping=Stopping(max_new_tokens=2)
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


def _ready(loaded: LoadedModel, config: WorkerConfig, num_packed: int) -> Ready:
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
        },
    )
