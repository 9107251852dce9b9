"""Small LoRA adapters as PEFT writes them, made of numpy arrays; and the bases they fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "org/tiny"
HIDDEN, INNER, NUM_LAYERS = 16, 24, 2
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (INNER, HIDDEN)}
"""Module -> inputs, outputs, in each of the layers."""


def peft_config(**changes: Any) -> dict[str, Any]:
    """What PEFT 0.21 saves for a LoRA, with ``changes``."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": BASE, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
        "target_modules": ["q_proj", "down_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
        **changes,
    }  # fmt: skip


def lora_tensors(rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for module, (num_inputs, num_outputs) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = generator.standard_normal((rank, num_inputs)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = generator.standard_normal((num_outputs, rank)).astype(np.float32)
    return tensors


def base_tensors(hidden: int = HIDDEN) -> dict[str, np.ndarray]:
    """The weights of a base that the adapters fit."""
    tensors = {"model.embed_tokens.weight": np.zeros((32, hidden), np.float32)}
    for layer in range(NUM_LAYERS):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = np.zeros((hidden, hidden), np.float32)
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = np.zeros((hidden, INNER), np.float32)
    return tensors


def lora_files(seed: int = 0, config: Mapping[str, Any] | None = None, rank: int = 4) -> dict[str, bytes]:
    """The two files of an adapter; another ``seed`` is another adapter."""
    raw = json.dumps(dict(config) if config is not None else peft_config(r=rank)).encode()
    return {CONFIG: raw, WEIGHTS: save(lora_tensors(rank, seed), metadata={"format": "pt"})}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
