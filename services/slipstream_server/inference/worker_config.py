"""How the front tells a worker what to serve: one struct, passed as JSON on the worker's command line. Torch-free; no
secrets in it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from slipstream_server.inference.engine.scheduler import BatchLimits
from slipstream_server.models.load_options import LoadOptions

EngineName = Literal["padded", "continuous", "tasks", "null"]


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a worker needs to know.

    ``threads`` 0: one for each core the process may use. ``packed_linears``: on a CPU, keep linear weights in oneDNN's
    own layout as well, where that gives the same products (faster; their memory once more). ``adapter_slots``:
    adapters held on the device at once, which is also the most that one batch mixes; 0 for a model without adapters.
    ``max_batch_tokens`` is what padded tensors may grow to, or what the blocks of a continuous batch hold.
    ``kv_memory_fraction``: on GPUs, blocks take what this share of the device leaves beside the weights instead, up to
    what ``max_batch_size`` sequences could use; 0: no such share.
    ``max_step_tokens`` (0: by device) bounds one step of a continuous batch or of tasks; ``max_draft_tokens`` guesses.
    ``tasks``: the ids of those that the engine "tasks" runs, all with one head.
    """

    model_folder: Path | None = None
    load: LoadOptions = LoadOptions()
    engine: EngineName = "padded"
    tasks: tuple[str, ...] = ()
    max_batch_size: int = 16
    max_batch_tokens: int = 16384
    kv_memory_fraction: float = 0.0
    max_queue_delay_ms: float = 5.0
    max_step_tokens: int = 0
    max_draft_tokens: int = 0
    prefix_caching: bool = True
    threads: int = 0
    packed_linears: bool = True
    adapter_slots: int = 8
    max_adapter_rank: int = 64
    log_level: str = "INFO"
    log_format: Literal["auto", "json", "text"] = "auto"

    def __post_init__(self) -> None:
        if self.engine != "null" and self.model_folder is None:
            raise ValueError("model_folder is needed by every engine but null")
        if self.engine == "tasks" and not self.tasks:
            raise ValueError("tasks are needed by the engine tasks")
        for name, value, least in (
            ("threads", self.threads, 0),
            ("max_step_tokens", self.max_step_tokens, 0),
            ("max_draft_tokens", self.max_draft_tokens, 0),
            ("adapter_slots", self.adapter_slots, 0),
            ("max_adapter_rank", self.max_adapter_rank, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; at least {least}")
        if not 0 <= self.kv_memory_fraction <= 1:
            raise ValueError(f"kv_memory_fraction is {self.kv_memory_fraction}; 0 to 1")
        self.limits()

    def limits(self) -> BatchLimits:
        """The batch limits; ValueError names a bad one."""
        return BatchLimits(
            max_batch_size=self.max_batch_size,
            max_batch_tokens=self.max_batch_tokens,
            max_queue_delay_ms=self.max_queue_delay_ms,
            max_batch_adapters=max(1, self.adapter_slots),
        )


def encode_config(config: WorkerConfig) -> str:
    """The config as JSON."""
    return msgspec.json.encode(config, enc_hook=_encode_path).decode()


def decode_config(text: str) -> WorkerConfig:
    """A config from JSON; msgspec.ValidationError names what is wrong."""
    return msgspec.json.decode(text, type=WorkerConfig, dec_hook=_decode_path)


def worker_command(config: WorkerConfig, socket_path: Path) -> list[str]:
    """The command line that starts a worker, which connects to the unix socket at ``socket_path``."""
    module = "slipstream_server.inference.worker"
    return [sys.executable, "-m", module, "--socket", str(socket_path), "--config", encode_config(config)]


def _encode_path(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} in a worker's configuration")


def _decode_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} in a worker's configuration")
