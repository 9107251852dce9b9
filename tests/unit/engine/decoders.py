"""Tiny seeded decoder-only models of many families, whose heads are of a size that paged attention takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB = 211
PAD = EOS = 2
_ENDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_ENDS}
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
_WIDE = {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 512}
_HALF = ["sliding_attention", "full_attention"]
_SPREAD = {"initializer_range": 0.2}
_QWEN2 = {**_LLAMA, **_SPREAD, "use_sliding_window": True, "sliding_window": 8, "layer_types": _HALF}
_GEMMA = {**_LLAMA, **_SPREAD, "head_dim": 8, "tie_word_embeddings": False}

BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, **_SPREAD)),
    "llama-biased": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, **_SPREAD, attention_bias=True)),
    "llama-odd-heads": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, **_SPREAD, head_dim=10)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA, **_SPREAD)),
    "qwen2-sliding": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_QWEN2)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, **_SPREAD, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, **_SPREAD, sliding_window=8)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GEMMA)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **_GEMMA, sliding_window=8, layer_types=_HALF, attn_logit_softcapping=3.0, final_logit_softcapping=9.0,
            query_pre_attn_scalar=5,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA, sliding_window=8, layer_types=_HALF)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_WIDE, **_SPREAD, partial_rotary_factor=0.5)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA, **_SPREAD, sliding_window=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_positions=512, n_embd=32, n_layer=2, n_head=4, **_SPREAD, **_ENDS)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **_COMMON, ffn_dim=48, max_position_embeddings=512, word_embed_proj_dim=32, init_std=0.2, dropout=0.0
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_WIDE, **_SPREAD)),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_LLAMA, **_SPREAD)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, **_SPREAD, num_local_experts=4)),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **_LLAMA, **_SPREAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
    # A window that only the masks of its own attention know.
    "qwen2_moe-sliding": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **_QWEN2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
    # Attention in pieces, which only its masks know.
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(**_LLAMA, **_SPREAD, head_dim=8, intermediate_size_mlp=48, attention_chunk_size=8)
    ),
    "falcon-rope": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_COMMON, **_SPREAD, alibi=False)),
    "falcon-alibi": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_COMMON, **_SPREAD, alibi=True)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **_SPREAD, **_ENDS)
    ),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=512, **_SPREAD, **_ENDS)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, **_SPREAD, **_ENDS)
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A fresh model with the same weights each time; spread, so that its choices are far from ties."""
    torch.manual_seed(11)
    return BUILDERS[name]().to(dtype).eval()
