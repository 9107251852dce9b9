"""How much memory a model needs, from its facts alone: before anything is loaded, or even downloaded.

Weights are exact where the safetensors headers were read, or the configuration's family is known to ``parameters``;
otherwise they are counted from the shapes that most decoders have (a few per cent off for unusual ones; ``counting``
is exact for all). Knows nothing of devices. Pure functions; any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from slipstream_server.errors import InvalidField
from slipstream_server.models.facts import Family, ModelFacts
from slipstream_server.models.load_options import Quantization

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# bitsandbytes: 8-bit rows with one float32 scale each; 4-bit blocks of 64 with a float32 scale, or with that scale in 8
# bits and a second float32 scale per 256 blocks (Dettmers et al., QLoRA, 2023, section 3).
_BYTES_8BIT = 1.0
_BYTES_4BIT = 0.5 + 4 / 64
_BYTES_4BIT_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)

# Activations of one forward are computed for at most so many tokens at a time; longer prompts are cut into chunks.
_CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes by what they hold; ``total_bytes`` is their sum. ``working_bytes`` (activations, logits) is a rough
    bound."""

    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.working_bytes


def estimate_memory(
    facts: ModelFacts,
    *,
    dtype: str | None = None,
    quantization: Quantization = Quantization.NONE,
    double_quantization: bool = False,
    batch_size: int = 1,
    context_tokens: int | None = None,
) -> MemoryEstimate:
    """The memory for ``batch_size`` sequences of ``context_tokens`` (the model's whole context when None; 512 when it
    has no limit).
    """
    if batch_size < 1:
        raise InvalidField.of("batch_size", f"{batch_size} is not at least 1")
    if context_tokens is not None and context_tokens < 0:
        raise InvalidField.of("context_tokens", f"{context_tokens} is negative")
    element_bytes = _dtype_bytes(dtype or facts.dtype)
    tokens = context_tokens if context_tokens is not None else facts.context_tokens or 512
    return MemoryEstimate(
        weight_bytes=_weight_bytes(facts, element_bytes, quantization, double_quantization),
        kv_bytes_per_token=_kv_bytes(facts, 1, element_bytes),
        kv_bytes=batch_size * _kv_bytes(facts, tokens, element_bytes),
        working_bytes=_working_bytes(facts, batch_size, tokens, element_bytes),
    )


def count_parameters(facts: ModelFacts) -> int:
    """Parameters: those stored, or computed from the shapes of the configuration where there are no weights yet."""
    if facts.num_parameters:
        return facts.num_parameters
    if facts.configured is not None:
        return facts.configured.total
    hidden, inner = facts.hidden_size or 0, facts.intermediate_size or 0
    heads, kv_heads = facts.num_heads or 0, facts.num_kv_heads or 0
    key_dim, value_dim = facts.head_dim or 0, facts.value_head_dim or 0
    attention = hidden * (heads * key_dim + kv_heads * (key_dim + value_dim) + heads * value_dim)
    is_plain = facts.family is not Family.DECODER or facts.model_type in {
        "gpt2",
        "opt",
        "gpt_neox",
        "bloom",
        "gptj",
        "falcon",
    }
    layer = attention + (2 if is_plain else 3) * hidden * inner + 2 * hidden
    if facts.family is Family.ENCODER_DECODER:
        layer = 2 * layer + attention
    return (facts.num_layers or 0) * layer + _embedding_parameters(facts) + hidden


def _embedding_parameters(facts: ModelFacts) -> int:
    """The token table and, where it is not shared with it, the output table: what quantization leaves alone."""
    has_output_table = facts.is_generative and not facts.ties_embeddings
    return (facts.vocab_size or 0) * (facts.hidden_size or 0) * (2 if has_output_table else 1)


def _weight_bytes(facts: ModelFacts, element_bytes: int, quantization: Quantization, double: bool) -> int:
    if facts.is_quantized:
        return facts.weight_bytes
    parameters = count_parameters(facts)
    if quantization is Quantization.NONE:
        return parameters * element_bytes
    kept = min(parameters, _embedding_parameters(facts) if facts.configured is None else facts.configured.other)
    quantized_bytes = (
        _BYTES_8BIT if quantization is Quantization.EIGHT_BIT else _BYTES_4BIT_DOUBLE if double else _BYTES_4BIT
    )
    return int(kept * element_bytes + (parameters - kept) * quantized_bytes)


def _kv_bytes(facts: ModelFacts, tokens: int, element_bytes: int) -> int:
    """Keys and values of one sequence; layers with a sliding window keep no more than the window."""
    per_layer = facts.kv_elements_per_layer_token
    if per_layer is None or facts.num_layers is None or facts.family is Family.ENCODER:
        return 0
    sliding_tokens = min(tokens, facts.sliding_window_tokens or tokens)
    layer_tokens = (facts.num_layers - facts.num_sliding_layers) * tokens + facts.num_sliding_layers * sliding_tokens
    # An encoder-decoder caches its cross-attention to as many input tokens besides.
    return layer_tokens * per_layer * element_bytes * (2 if facts.family is Family.ENCODER_DECODER else 1)


def _working_bytes(facts: ModelFacts, batch_size: int, tokens: int, element_bytes: int) -> int:
    chunk = min(batch_size * tokens, max(_CHUNK_TOKENS, batch_size))
    activations = chunk * (8 * (facts.hidden_size or 0) + 3 * (facts.intermediate_size or 0)) * element_bytes
    logits = batch_size * (facts.vocab_size or 0) * 2 * 4 if facts.is_generative else 0
    return activations + logits


def _dtype_bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise InvalidField.of("dtype", f"{dtype!r} is not one of {', '.join(sorted(DTYPE_BYTES))}")
    return DTYPE_BYTES[dtype]
