"""Parameters by arithmetic against the classes of transformers, built on the meta device."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slipstream_server.models.parameters import count_parameters_of

DECODER = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
SEQUENCES = {
    "vocab_size": 320, "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 96, "pad_token_id": 1,
}  # fmt: skip
LATENT = {
    **DECODER, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "n_shared_experts": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "kv_lora_rank": 12,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10,
}  # fmt: skip
T5 = {"vocab_size": 320, "d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
CAUSAL, MASKED, LABELS = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"
TEXTS, PLAIN, QUESTIONS = "AutoModelForSeq2SeqLM", "AutoModel", "AutoModelForQuestionAnswering"

CASES: list[tuple[str, dict[str, Any], str]] = [
    *((kind, {**DECODER, "pad_token_id": 0}, CAUSAL) for kind in (
        "llama", "mistral", "granite", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3",
        "starcoder2", "stablelm", "phi",
    )),
    ("llama", {**DECODER, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, CAUSAL),
    ("qwen3", {**DECODER, "head_dim": 16, "pad_token_id": 0}, LABELS),
    ("llama", DECODER, PLAIN),
    ("mixtral", {**DECODER, "num_local_experts": 4}, CAUSAL),
    ("qwen2_moe", {
        **DECODER, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2, "mlp_only_layers": [],
    }, CAUSAL),
    ("qwen3_moe", {**DECODER, "num_experts": 4, "moe_intermediate_size": 24, "mlp_only_layers": [1]}, CAUSAL),
    ("deepseek_v3", {**LATENT, "q_lora_rank": 16}, CAUSAL),
    ("deepseek_v2", {**LATENT, "q_lora_rank": None}, CAUSAL),
    ("gpt2", {"vocab_size": 320, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}, CAUSAL),
    ("gpt_neox", ENCODER, CAUSAL),
    ("opt", {
        "vocab_size": 320, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "word_embed_proj_dim": 32, "max_position_embeddings": 64,
    }, CAUSAL),
    ("bloom", {"vocab_size": 320, "hidden_size": 48, "n_layer": 2, "n_head": 4}, CAUSAL),
    *((kind, ENCODER, head) for kind in ("bert", "roberta", "mpnet") for head in (PLAIN, MASKED, LABELS)),
    ("xlm-roberta", ENCODER, QUESTIONS),
    *((kind, {**ENCODER, "embedding_size": 24}, head) for kind in ("electra", "albert") for head in (MASKED, LABELS)),
    ("camembert", ENCODER, "AutoModelForTokenClassification"),
    *(("distilbert", {
        "vocab_size": 320, "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
    }, head) for head in (PLAIN, MASKED, LABELS, QUESTIONS)),
    ("deberta-v2", {
        **ENCODER, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "pos_att_type": "p2c|c2p", "position_biased_input": False, "type_vocab_size": 0,
    }, LABELS),
    ("vit", {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8,
    }, "AutoModelForImageClassification"),
    ("t5", T5, TEXTS),
    ("t5", {**T5, "feed_forward_proj": "gated-gelu"}, TEXTS),
    ("mt5", {**T5, "feed_forward_proj": "gated-gelu"}, TEXTS),
    *((kind, {**SEQUENCES, "max_position_embeddings": 64}, TEXTS) for kind in ("bart", "mbart", "pegasus", "marian")),
    ("whisper", {
        **SEQUENCES, "num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 40,
    }, "AutoModelForSpeechSeq2Seq"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "shape", "head"), CASES)
def test_the_count_is_that_of_the_built_model(model_type: str, shape: dict[str, Any], head: str) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **shape)
    with torch.device("meta"):
        model = getattr(transformers, head).from_config(config)
    model.tie_weights()
    stored = json.loads(json.dumps({**config.to_dict(), "architectures": [type(model).__name__]}, default=str))
    counted = count_parameters_of(stored)
    assert counted is not None
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    output = model.get_output_embeddings()
    linear = [
        layer.weight.numel()
        for layer in model.modules()
        if (isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D") and layer is not output
    ]
    assert counted.linear == sum(linear)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba"},
        {},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **DECODER, "hidden_size": "wide"},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **DECODER, "hidden_size": -1},
        {"model_type": "llama", "architectures": ["LlamaForEverything"], **DECODER},
        {"model_type": "bert", "architectures": 7, **ENCODER},
    ],
)
def test_what_is_not_known_is_not_guessed(config: dict[str, Any]) -> None:
    assert count_parameters_of(config) is None
