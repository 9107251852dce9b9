"""What every engine begins with: the worker's threads and its model, loaded and packed; and the facts of both.

On whichever thread the engine is assembled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from slipstream_server.inference.engine.packing import pack_linears, packed_bytes
from slipstream_server.inference.generation import Ready
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.models.loading import LoadedModel, load_model

Report = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """The model of a worker, and the prepared folder it is from; ``num_packed`` of its linear layers are packed."""

    folder: Path
    loaded: LoadedModel
    num_packed: int

    def ready(self, config: WorkerConfig, **settings: str) -> Ready:
        """What the front is told when the engine stands; ``settings`` are further ones, or say more than ``config``."""
        return Ready(
            device=str(self.loaded.device),
            dtype=str(self.loaded.dtype).removeprefix("torch."),
            attention=self.loaded.attn_implementation,
            batching=config.engine,
            memory_bytes=self.loaded.memory_bytes + packed_bytes(self.loaded.model),
            settings={
                "threads": str(torch.get_num_threads()),
                "packed_linears": str(self.num_packed),
                "max_batch_size": str(config.max_batch_size),
                "max_batch_tokens": str(config.max_batch_tokens),
                "max_queue_delay_ms": f"{config.max_queue_delay_ms:g}",
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                **settings,
            },
        )


def load_worker_model(config: WorkerConfig, load: LoadOptions, report: Report) -> WorkerModel:
    """Set the number of threads, load the model by ``load`` and pack it where it is on a CPU. Raises as load_model."""
    # Of every configuration that has an engine with a model.
    assert config.model_folder is not None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    report(0.0, "reading weights")
    loaded = load_model(config.model_folder, load)
    report(0.8, "preparing the model")
    num_packed = 0
    if config.packed_linears and loaded.device.type == "cpu":
        num_packed = pack_linears(loaded.model, given_alike=config.engine == "continuous")
    return WorkerModel(folder=config.model_folder, loaded=loaded, num_packed=num_packed)
