"""Parameters of decoder-only families; see ``parameters``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slipstream_server.models.parameters import Counting, Shape, Tally, Unsaid


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    """Where families that are built like Llama differ. Biases are None where the configuration decides."""

    qkv_bias: bool | None = False
    output_bias: bool | None = False
    norms: int = 2
    head_norms: bool = False
    wide_head_norms: bool = False
    ties_by_default: bool = False


def _llama_like(style: _Style) -> Counting:
    def count(shape: Shape) -> Tally:
        model, hidden = Tally(), shape.size("hidden_size")
        layers = shape.size("num_hidden_layers")
        model.add(_attention(shape, style), times=layers)
        model.add(_gated(hidden, shape.size("intermediate_size"), bias=shape.flag("mlp_bias", False)), times=layers)
        model.other(hidden, times=layers * style.norms + 1)
        _add_tables(model, shape, hidden, ties_by_default=style.ties_by_default)
        return model

    return count


def _attention(shape: Shape, style: _Style) -> Tally:
    hidden, heads = shape.size("hidden_size"), shape.size("num_attention_heads")
    kv_heads = shape.size("num_key_value_heads", default=heads)
    dim = shape.size("head_dim", default=hidden // max(heads, 1))
    configured = shape.flag("attention_bias", False)
    qkv_bias = configured if style.qkv_bias is None else style.qkv_bias
    part = Tally()
    part.linear(hidden, heads * dim, bias=qkv_bias)
    part.linear(hidden, kv_heads * dim, bias=qkv_bias, times=2)
    part.linear(heads * dim, hidden, bias=configured if style.output_bias is None else style.output_bias)
    if style.head_norms:
        part.other(dim, dim)
    if style.wide_head_norms:
        part.other(heads * dim, kv_heads * dim)
    return part


def _gated(hidden: int, inner: int, *, bias: bool = False) -> Tally:
    part = Tally()
    part.linear(hidden, inner, bias=bias, times=2)
    part.linear(inner, hidden, bias=bias)
    return part


def _plain(hidden: int, inner: int, *, bias: bool = True) -> Tally:
    part = Tally()
    part.linear(hidden, inner, bias=bias)
    part.linear(inner, hidden, bias=bias)
    return part


def _add_tables(model: Tally, shape: Shape, width: int, *, ties_by_default: bool = False) -> None:
    """The token table, and the output table where there is one of its own; or a head for labels."""
    vocabulary = shape.size("vocab_size")
    model.other(vocabulary * width)
    if shape.ends_with("ForSequenceClassification", "ForTokenClassification"):
        is_biased = shape.ends_with("ForTokenClassification")
        model.linear(width, shape.num_labels, bias=is_biased)
    elif shape.ends_with("ForCausalLM", "LMHeadModel"):
        if not shape.flag("tie_word_embeddings", ties_by_default):
            model.other(vocabulary * width)
    elif not shape.ends_with("Model"):
        raise Unsaid("architectures")


def _mixture(shape: Shape, *, inner: str, experts: tuple[str, ...]) -> Tally:
    """A router and its experts, whose weights are stacked tensors rather than linear layers."""
    hidden, num_experts = shape.size("hidden_size"), shape.size(*experts)
    part = Tally()
    part.other(hidden * num_experts)
    part.other(3 * hidden * shape.size(inner), times=num_experts)
    return part


def _mixtral(shape: Shape) -> Tally:
    model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
    model.add(_attention(shape, _Style()), times=layers)
    model.add(_mixture(shape, inner="intermediate_size", experts=("num_local_experts",)), times=layers)
    model.other(hidden, times=2 * layers + 1)
    _add_tables(model, shape, hidden)
    return model


def _qwen_moe(style: _Style, *, has_shared_expert: bool) -> Counting:
    def count(shape: Shape) -> Tally:
        model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
        model.add(_attention(shape, style), times=layers)
        sparse = _num_sparse(shape, layers)
        model.add(_gated(hidden, shape.size("intermediate_size")), times=layers - sparse)
        model.add(
            _mixture(shape, inner="moe_intermediate_size", experts=("num_experts", "num_local_experts")), times=sparse
        )
        if has_shared_expert:
            model.add(_gated(hidden, shape.size("shared_expert_intermediate_size")), times=sparse)
            model.linear(hidden, 1, times=sparse)
        model.other(hidden, times=2 * layers + 1)
        _add_tables(model, shape, hidden)
        return model

    return count


def _num_sparse(shape: Shape, layers: int) -> int:
    dense = shape.config.get("mlp_only_layers") or []
    step = shape.size("decoder_sparse_step", default=1)
    if not isinstance(dense, list) or step == 0 or layers > 10_000:
        raise Unsaid("mlp_only_layers")
    return sum(1 for index in range(layers) if index not in dense and (index + 1) % step == 0)


def _deepseek(shape: Shape) -> Tally:
    """Multi-head latent attention, and a mixture after the first dense layers."""
    model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
    model.add(_latent_attention(shape), times=layers)
    dense = min(layers, shape.size("first_k_dense_replace", default=0))
    model.add(_gated(hidden, shape.size("intermediate_size")), times=dense)
    sparse = layers - dense
    experts = ("n_routed_experts", "num_local_experts")
    model.add(_mixture(shape, inner="moe_intermediate_size", experts=experts), times=sparse)
    shared = shape.size("n_shared_experts", default=0) * shape.size("moe_intermediate_size")
    if shared:
        model.add(_gated(hidden, shared), times=sparse)
    model.other(hidden, times=2 * layers + 1)
    _add_tables(model, shape, hidden)
    return model


def _latent_attention(shape: Shape) -> Tally:
    hidden, heads, latent = shape.size("hidden_size"), shape.size("num_attention_heads"), shape.size("kv_lora_rank")
    plain_dim, rotary_dim = shape.size("qk_nope_head_dim"), shape.size("qk_rope_head_dim")
    value_dim, bias = shape.size("v_head_dim"), shape.flag("attention_bias", False)
    part = Tally()
    if shape.config.get("q_lora_rank") is None:
        part.linear(hidden, heads * (plain_dim + rotary_dim))
    else:
        rank = shape.size("q_lora_rank")
        part.linear(hidden, rank, bias=bias)
        part.other(rank)
        part.linear(rank, heads * (plain_dim + rotary_dim))
    part.linear(hidden, latent + rotary_dim, bias=bias)
    part.other(latent)
    part.linear(latent, heads * (plain_dim + value_dim))
    part.linear(heads * value_dim, hidden, bias=bias)
    return part


def _gpt2(shape: Shape) -> Tally:
    model, width, layers = Tally(), shape.size("n_embd", "hidden_size"), shape.size("n_layer", "num_hidden_layers")
    model.linear(width, 3 * width, bias=True, times=layers)
    model.linear(width, width, bias=True, times=layers)
    model.add(_plain(width, shape.size("n_inner", default=4 * width)), times=layers)
    model.other(2 * width, times=2 * layers + 1)
    model.other(shape.size("n_positions", "max_position_embeddings") * width)
    _add_tables(model, shape, width, ties_by_default=True)
    return model


def _gpt_neox(shape: Shape) -> Tally:
    model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
    bias = shape.flag("attention_bias", True)
    model.linear(hidden, 3 * hidden, bias=bias, times=layers)
    model.linear(hidden, hidden, bias=bias, times=layers)
    model.add(_plain(hidden, shape.size("intermediate_size")), times=layers)
    model.other(2 * hidden, times=2 * layers + 1)
    _add_tables(model, shape, hidden)
    return model


def _opt(shape: Shape) -> Tally:
    model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
    bias, width = shape.flag("enable_bias", True), shape.size("word_embed_proj_dim", default=shape.size("hidden_size"))
    model.linear(hidden, hidden, bias=bias, times=4 * layers)
    model.add(_plain(hidden, shape.size("ffn_dim"), bias=bias), times=layers)
    norm = 2 * hidden if shape.flag("layer_norm_elementwise_affine", True) else 0
    model.other(norm, times=2 * layers)
    if shape.flag("do_layer_norm_before", True) and not shape.flag("_remove_final_layer_norm", False):
        model.other(norm)
    model.other((shape.size("max_position_embeddings") + 2) * hidden)
    if width != hidden:
        model.linear(width, hidden, times=2)
    _add_tables(model, shape, width, ties_by_default=True)
    return model


def _bloom(shape: Shape) -> Tally:
    model, hidden, layers = Tally(), shape.size("hidden_size", "n_embed"), shape.size("n_layer", "num_hidden_layers")
    model.linear(hidden, 3 * hidden, bias=True, times=layers)
    model.linear(hidden, hidden, bias=True, times=layers)
    model.add(_plain(hidden, 4 * hidden), times=layers)
    model.other(2 * hidden, times=2 * layers + 2)
    _add_tables(model, shape, hidden, ties_by_default=True)
    return model


def _phi(shape: Shape) -> Tally:
    model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
    model.add(_attention(shape, _Style(qkv_bias=True, output_bias=True)), times=layers)
    model.add(_plain(hidden, shape.size("intermediate_size")), times=layers)
    model.other(2 * hidden, times=layers + 1)
    if shape.flag("qk_layernorm", False):
        raise Unsaid("qk_layernorm")
    _add_tables(model, shape, hidden)
    if shape.ends_with("ForCausalLM"):
        model.other(shape.size("vocab_size"))
    return model


def _starcoder2(shape: Shape) -> Tally:
    model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
    bias = shape.flag("use_bias", True)
    model.add(_attention(shape, _Style(qkv_bias=bias, output_bias=bias)), times=layers)
    model.add(_plain(hidden, shape.size("intermediate_size"), bias=bias), times=layers)
    model.other(2 * hidden, times=2 * layers + 1)
    _add_tables(model, shape, hidden, ties_by_default=True)
    return model


def _stablelm(shape: Shape) -> Tally:
    model, hidden, layers = Tally(), shape.size("hidden_size"), shape.size("num_hidden_layers")
    if shape.flag("qk_layernorm", False) or shape.flag("use_parallel_residual", False):
        raise Unsaid("qk_layernorm")
    model.add(_attention(shape, _Style(qkv_bias=shape.flag("use_qkv_bias", False))), times=layers)
    model.add(_gated(hidden, shape.size("intermediate_size")), times=layers)
    model.other(2 * hidden, times=2 * layers + 1)
    _add_tables(model, shape, hidden)
    return model


_CONFIGURED = _Style(qkv_bias=None, output_bias=None)

DECODERS: Mapping[str, Counting] = {
    "llama": _llama_like(_CONFIGURED),
    "mistral": _llama_like(_Style()),
    "granite": _llama_like(_CONFIGURED),
    "smollm3": _llama_like(_Style(qkv_bias=None, output_bias=None, ties_by_default=True)),
    "qwen2": _llama_like(_Style(qkv_bias=True)),
    "qwen3": _llama_like(_Style(qkv_bias=None, output_bias=None, head_norms=True)),
    "gemma": _llama_like(_Style(qkv_bias=None, output_bias=None, ties_by_default=True)),
    "gemma2": _llama_like(_Style(qkv_bias=None, output_bias=None, norms=4, ties_by_default=True)),
    "gemma3_text": _llama_like(_Style(qkv_bias=None, output_bias=None, norms=4, head_norms=True, ties_by_default=True)),
    "phi3": _llama_like(_Style()),
    "olmo2": _llama_like(_Style(qkv_bias=None, output_bias=None, wide_head_norms=True)),
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe(_Style(qkv_bias=True), has_shared_expert=True),
    "qwen3_moe": _qwen_moe(_Style(qkv_bias=None, output_bias=None, head_norms=True), has_shared_expert=False),
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
    "phi": _phi,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
}
