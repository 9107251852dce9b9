from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream_server.errors import InvalidField
from slipstream_server.models.estimate import count_parameters, estimate_memory
from slipstream_server.models.facts import facts_of_config, read_facts
from slipstream_server.models.load_options import Quantization

# As published in the models' config.json files.
LLAMA_3_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(("config", "published"), [(LLAMA_3_8B, 8_030_261_248), (MISTRAL_7B, 7_241_732_096)])
def test_parameters_from_a_config_alone_match_the_published_count(config: dict[str, object], published: int) -> None:
    assert count_parameters(facts_of_config(config)) == published


def test_kv_of_llama_3_is_128_kib_per_token() -> None:
    estimate = estimate_memory(facts_of_config(LLAMA_3_8B), batch_size=4, context_tokens=1000)
    assert estimate.kv_bytes_per_token == 128 * 1024
    assert estimate.kv_bytes == 4 * 1000 * 128 * 1024
    assert estimate.weight_bytes == 2 * 8_030_261_248
    assert estimate.total_bytes == estimate.weight_bytes + estimate.kv_bytes + estimate.working_bytes


def test_a_sliding_window_bounds_the_kv_of_a_long_context() -> None:
    facts = facts_of_config(MISTRAL_7B)
    assert estimate_memory(facts).kv_bytes == estimate_memory(facts, context_tokens=4096).kv_bytes == 4096 * 128 * 1024


def test_encoders_keep_no_kv(built_models: Callable[[str], Path]) -> None:
    estimate = estimate_memory(read_facts(built_models("bert")), batch_size=8)
    assert (estimate.kv_bytes, estimate.kv_bytes_per_token) == (0, 0)


def test_the_kv_of_a_tiny_model_is_what_its_cache_holds(built_models: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = built_models("llama")
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_pretrained(folder)(torch.ones(3, 11, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate_memory(read_facts(folder), batch_size=3, context_tokens=11).kv_bytes == held


def test_quantization_shrinks_the_linear_layers_only() -> None:
    facts = facts_of_config(LLAMA_3_8B)
    sizes = [
        estimate_memory(facts, quantization=kind, double_quantization=double).weight_bytes
        for kind, double in [
            (Quantization.NONE, False),
            (Quantization.EIGHT_BIT, False),
            (Quantization.FOUR_BIT, False),
            (Quantization.FOUR_BIT, True),
        ]
    ]
    assert sizes == sorted(sizes, reverse=True)
    tables_bytes = 2 * 128256 * 4096 * 2
    assert all(size > tables_bytes for size in sizes)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [({"batch_size": 0}, "batch_size"), ({"context_tokens": -1}, "context_tokens"), ({"dtype": "int3"}, "dtype")],
)
def test_bad_arguments_are_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        estimate_memory(facts_of_config(LLAMA_3_8B), **arguments)  # type: ignore[arg-type]
