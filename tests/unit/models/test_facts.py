"""What transformers itself says of the tiny models is the second source here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream_server.errors import CorruptArtifact
from slipstream_server.models.facts import Family, facts_of_config, read_facts

ModelCopy = Callable[[str], Path]
EditJson = Callable[..., None]


@pytest.mark.parametrize(
    ("kind", "family", "is_generative", "context_tokens"),
    [
        ("llama", Family.DECODER, True, 128),
        ("gpt2", Family.DECODER, True, 64),
        ("t5", Family.ENCODER_DECODER, True, None),
        ("bert", Family.ENCODER, False, 64),
    ],
)
def test_facts_agree_with_transformers(
    built_models: Callable[[str], Path], kind: str, family: Family, is_generative: bool, context_tokens: int | None
) -> None:
    import transformers

    folder = built_models(kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    facts = read_facts(folder)
    assert facts.family is family
    assert facts.is_generative is is_generative
    assert facts.context_tokens == context_tokens
    assert facts.model_type == config.model_type
    assert facts.vocab_size == config.vocab_size
    assert facts.num_parameters == model.num_parameters()
    assert facts.weight_bytes == 4 * model.num_parameters()
    assert facts.dtype == "float32"
    assert facts.ties_embeddings == config.tie_word_embeddings
    assert facts.num_layers == (3 if kind == "t5" else config.num_hidden_layers)
    assert facts.has_tokenizer
    assert facts.has_chat_template is (kind == "llama")


def test_token_ids_and_defaults_come_from_the_generation_config(model_copy: ModelCopy, edit_json: EditJson) -> None:
    folder = model_copy("llama")
    edit_json(
        folder / "generation_config.json", eos_token_id=[2, 5], pad_token_id=7, do_sample=True, temperature=0.6,
        top_p=0.9,
        max_new_tokens=40, suppress_tokens=[3],
    )  # fmt: skip
    facts = read_facts(folder)
    assert facts.eos_token_ids == (2, 5)
    assert facts.pad_token_id == 7
    generation = facts.generation
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)
    assert (generation.max_new_tokens, generation.top_k) == (40, None)
    assert generation.other == {"suppress_tokens": [3]}


def test_labels_come_in_order_of_their_ids(built_models: Callable[[str], Path]) -> None:
    assert read_facts(built_models("bert")).labels == ("negative", "neutral", "positive")


@pytest.mark.parametrize("stored", ["torch.bfloat16", "bfloat16"])
def test_both_spellings_of_the_dtype_are_read(stored: str) -> None:
    assert facts_of_config({"model_type": "llama", "torch_dtype": stored}).dtype == "bfloat16"


def test_positions_that_start_after_padding_are_not_offered() -> None:
    # RoBERTa base: 514 rows in its table, 512 tokens of input (its model card).
    config = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert facts_of_config(config).context_tokens == 512


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", [{"rope_type": "longrope"}, {"type": "su"}])
@pytest.mark.parametrize("inner", [True, False])
def test_long_rope_is_offered_as_far_as_it_turns_positions_alike(key: str, kind: dict[str, str], inner: bool) -> None:
    bound = {"original_max_position_embeddings": 4096}
    config = {"model_type": "phi3", "max_position_embeddings": 131_072, key: {**kind, **(bound if inner else {})}}
    assert facts_of_config({**config, **({} if inner else bound)}).context_tokens == 4096
    assert facts_of_config({**config, key: {"rope_type": "llama3", **bound}}).context_tokens == 131_072


@pytest.mark.parametrize(
    ("change", "window", "sliding_layers"),
    [
        ({"sliding_window": 16}, 16, 4),
        ({"sliding_window": 16, "use_sliding_window": False}, None, 0),
        ({"sliding_window": None}, None, 0),
        ({"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}, 16, 2),
    ],
)
def test_sliding_windows(change: dict[str, Any], window: int | None, sliding_layers: int) -> None:
    facts = facts_of_config({"model_type": "mistral", "num_hidden_layers": 4, **change})
    assert (facts.sliding_window_tokens, facts.num_sliding_layers) == (window, sliding_layers)


@pytest.mark.parametrize(
    ("config", "kv_elements"),
    [
        # Llama 3 8B: 8 key-value heads of 128, keys and values.
        ({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}, 2 * 8 * 128),
        ({"hidden_size": 4544, "num_attention_heads": 71, "multi_query": True}, 2 * 64),
        ({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, 2 * 4 * 32),
        ({"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
          "v_head_dim": 20}, 4 * (24 + 20)),
        ({"hidden_size": 64}, None),
    ],
)  # fmt: skip
def test_elements_of_keys_and_values(config: dict[str, Any], kv_elements: int | None) -> None:
    assert facts_of_config({"model_type": "x", **config}).kv_elements_per_layer_token == kv_elements


def test_a_vision_language_model_is_described_by_its_text_part() -> None:
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "vocab_size": 999, "num_hidden_layers": 5},
    }
    facts = facts_of_config(config)
    assert (facts.family, facts.vocab_size, facts.num_layers) == (Family.DECODER, 999, 5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", -1),
        ("vocab_size", "300"),
        ("vocab_size", 2**63),
        ("vocab_size", True),
        ("vocab_size", 1.5),
        ("eos_token_id", "2"),
        ("eos_token_id", [[2]]),
        ("eos_token_id", list(range(5000))),
        ("model_type", 5),
        ("model_type", "x" * 1000),
    ],
)
def test_absurd_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(CorruptArtifact, match=key):
        facts_of_config({"model_type": "llama", key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "0.7"), ("temperature", True), ("top_k", 1.5), ("do_sample", 1), ("num_beams", -1)],
)
def test_absurd_generation_defaults_are_named(key: str, value: Any) -> None:
    with pytest.raises(CorruptArtifact, match=rf"generation_config\.json: {key}"):
        facts_of_config({"model_type": "llama"}, {key: value})


def test_infinite_generation_defaults_are_refused() -> None:
    with pytest.raises(CorruptArtifact, match="temperature"):
        facts_of_config({"model_type": "llama"}, json.loads('{"temperature": NaN}'))
