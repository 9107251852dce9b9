"""A tiny real model, written in a moment and without torch: two Llama layers of seeded noise, a byte-level tokenizer.

What it says is noise, but ``generate`` says the same noise, its tokens are bytes (so that characters are split across
them), and it runs hundreds of steps a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from unit.models.tokenizer_folders import byte_level, save_folder

CONTEXT_TOKENS = 32_768
_HIDDEN, _INNER, _LAYERS, _HEADS, _VOCAB = 64, 128, 2, 4, 400


def write_tiny_model(folder: Path, *, context_tokens: int = CONTEXT_TOKENS, **generation: object) -> Path:
    """A model folder that transformers opens; ``generation`` goes to its generation_config.json."""
    save_folder(folder, byte_level())
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": _VOCAB,
            "hidden_size": _HIDDEN,
            "intermediate_size": _INNER,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _HEADS,
            "max_position_embeddings": context_tokens,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "dtype": "float32",
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, **generation})
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights() -> dict[str, np.ndarray]:
    dice = np.random.default_rng(7)

    def noise(*shape: int, scale: float = 0.08) -> np.ndarray:
        return dice.normal(0.0, scale, shape).astype(np.float32)

    def ones() -> np.ndarray:
        return np.ones(_HIDDEN, np.float32)

    weights = {
        "model.embed_tokens.weight": noise(_VOCAB, _HIDDEN, scale=1.0),
        "model.norm.weight": ones(),
        "lm_head.weight": noise(_VOCAB, _HIDDEN, scale=0.5),
    }
    for layer in range(_LAYERS):
        place = f"model.layers.{layer}"
        weights |= {f"{place}.self_attn.{name}_proj.weight": noise(_HIDDEN, _HIDDEN) for name in "qkvo"}
        weights |= {
            f"{place}.mlp.gate_proj.weight": noise(_INNER, _HIDDEN),
            f"{place}.mlp.up_proj.weight": noise(_INNER, _HIDDEN),
            f"{place}.mlp.down_proj.weight": noise(_HIDDEN, _INNER),
            f"{place}.input_layernorm.weight": ones(),
            f"{place}.post_attention_layernorm.weight": ones(),
        }
    return weights


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
