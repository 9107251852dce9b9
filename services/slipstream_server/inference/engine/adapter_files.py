"""A LoRA adapter out of the two files that PEFT saves: safetensors, and a configuration of which every key is known.

The registry has checked them once and the front their hashes. Here they are read as though nobody had: what a batch
shared with other requests cannot apply row by row (whole modules, DoRA, changed biases) is refused by its name, and
weights that are not numbers never get near the model. Reads files; engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from slipstream_server.errors import CorruptArtifact, IncompatibleAdapter
from slipstream_server.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Read below, or of no consequence once the weights are there. Any other key must be off.
_KNOWN = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "target_modules", "exclude_modules",
        "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "inference_mode", "init_lora_weights", "ensure_weight_tying", "auto_mapping",
        "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
        "megatron_core", "runtime_config",
    }
)  # fmt: skip
# Initialisations that leave the base's weights as they are.
_KEEPING_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's update, ``up @ down``, scale included. ``down`` [rank, inputs], ``up`` [outputs, rank]; CPU."""

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs, outputs."""
        return self.down.shape[1], self.up.shape[0]


def read_adapter(folder: Path, *, max_rank: int) -> dict[str, Factors]:
    """The factors of every adapted module, by its path in the base model.

    Raises UnsafeWeights, CorruptArtifact, or IncompatibleAdapter where it is no plain LoRA up to ``max_rank``.
    """
    config = check_adapter_folder(folder)
    _refuse_variants(config)
    tensors = _read_tensors(folder / ADAPTER_WEIGHTS)
    modules = {name.removeprefix(_PREFIX).removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)}
    if len(tensors) != 2 * len(modules) or not modules:
        raise CorruptArtifact(f"{ADAPTER_WEIGHTS}: every adapted module needs exactly its two factors")
    return {module: _factors(module, tensors, config, max_rank) for module in sorted(modules)}


def _refuse_variants(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        _refuse(f"peft_type is {config.get('peft_type')!a:.80}; only LORA can be served")
    for key, value in config.items():
        if key not in _KNOWN and value:
            _refuse(f"{key[:80]!a} is set, and adapters with it cannot share a batch")
    if config.get("bias", "none") != "none":
        _refuse("bias is not 'none': changed biases cannot share a batch")
    initialization = config.get("init_lora_weights", True)
    if not any(initialization is kept or initialization == kept for kept in _KEEPING_THE_BASE):
        _refuse("init_lora_weights changes the base's weights; convert the adapter to a plain LoRA")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: _checked(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{ADAPTER_WEIGHTS}: cannot be read") from error


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not name.startswith(_PREFIX) or not name.endswith((_DOWN, _UP)) or tensor.dim() != 2:
        _refuse(f"{name[:120]!a} is no factor of a LoRA of a linear layer", ADAPTER_WEIGHTS)
    if tensor.dtype not in _FLOATS:
        _refuse(f"{name[:120]!a} is {tensor.dtype}, which is no floating-point type", ADAPTER_WEIGHTS)
    if not bool(tensor.isfinite().all()):
        raise CorruptArtifact(f"{ADAPTER_WEIGHTS}: {name[:120]!a} holds values that are not finite numbers")
    return tensor


def _factors(module: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], max_rank: int) -> Factors:
    down, up = tensors.get(f"{_PREFIX}{module}{_DOWN}"), tensors.get(f"{_PREFIX}{module}{_UP}")
    rank = _count(_pattern(config, "rank_pattern", module, config.get("r")), "r")
    if down is None or up is None or down.shape[0] != rank or up.shape[1] != rank or not (down.numel() and up.numel()):
        raise CorruptArtifact(f"{ADAPTER_WEIGHTS}: the factors of {module[:120]!a} do not have rank {rank}")
    if rank > max_rank:
        _refuse(f"rank {rank} is above {max_rank}, the largest that is served (inference.max_adapter_rank)")
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", rank))
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CorruptArtifact(f"{ADAPTER_CONFIG}: lora_alpha is no finite number")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(down, up.to(torch.promote_types(up.dtype, torch.float32)) * scale)


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """As PEFT looks it up: the first key that is the module's path or its end. Keys are plain names, never patterns."""
    entries = config.get(key) or {}
    if not isinstance(entries, dict):
        raise CorruptArtifact(f"{ADAPTER_CONFIG}: {key} is no mapping")
    for name, value in entries.items():
        if not all(piece.isidentifier() or piece.isdecimal() for piece in name.split(".")):
            _refuse(f"{key} has {name[:80]!a}, which is no plain name of a module")
        if module == name or module.endswith(f".{name}"):
            return value
    return default


def _count(value: Any, key: str) -> int:
    if type(value) is not int or value < 1:
        raise CorruptArtifact(f"{ADAPTER_CONFIG}: {key} is {value!a:.40}; a whole number of 1 or more is needed")
    return value


def _refuse(why: str, file: str = ADAPTER_CONFIG) -> NoReturn:
    raise IncompatibleAdapter(f"{file}: {why}")
