"""What a prepared model is, read from its JSON files and safetensors headers alone.

The front validates requests, renders defaults and budgets memory with these facts; none of it may need torch or
transformers. Reading blocks on the disk for milliseconds; any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from slipstream_server.errors import CorruptArtifact
from slipstream_server.models.folder import FAST_TOKENIZER, check_model_folder, is_generative, read_json_if_present
from slipstream_server.models.parameters import ParameterCount, count_parameters_of
from slipstream_server.models.safetensors_header import TensorEntry, read_header
from slipstream_server.models.untrusted_values import UntrustedValues

_CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length",
    "max_target_positions",
)  # fmt: skip
_LONG_ROPE = ("longrope", "su")
_TURNING = "original_max_position_embeddings"
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEAD_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
_INNER_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "hidden_dim")

# Headless checkpoints ("LlamaModel") do not say that they are causal.
_DECODER_TYPES = frozenset(
    {
        "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2",
        "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "llama",
        "llama4_text", "mamba", "mamba2", "mistral", "mixtral", "mpt", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2",
        "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip
# These count positions from pad_token_id + 1, so that the table holds that many fewer than it has rows.
_OFFSET_POSITION_TYPES = frozenset(
    {
        "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer",
        "roberta-prelayernorm", "data2vec-text",
    }
)  # fmt: skip

_OUTPUT_TABLES = ("lm_head.weight", "embed_out.weight", "output_projection.weight")
# Stored beside the parameters by older checkpoints: position ids and masks.
_BUFFER_DTYPES = frozenset({"I64", "BOOL"})
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


class Family(StrEnum):
    """How a model runs: token by token, once over its input, or both."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_DECODER = "encoder_decoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """The model's own generation_config; None where it says nothing. ``other`` keeps what is set besides."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    max_length: int | None = None
    num_beams: int | None = None
    num_return_sequences: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One model as its files describe it. Counts are exact; None means that the files do not say.

    ``pad_token_id`` is what the files say, not the fallback; ``num_parameters`` counts stored elements (packed ones in
    quantized checkpoints). ``configured`` is what the configuration alone stands for, where its family is known.
    """

    model_type: str
    architectures: tuple[str, ...]
    family: Family
    is_generative: bool
    context_tokens: int | None
    sliding_window_tokens: int | None
    vocab_size: int | None
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    generation: GenerationDefaults
    num_parameters: int
    weight_bytes: int
    has_tokenizer: bool
    has_chat_template: bool
    quantization_method: str | None
    ties_embeddings: bool
    num_layers: int | None
    num_sliding_layers: int
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    value_head_dim: int | None
    hidden_size: int | None
    intermediate_size: int | None
    num_labels: int | None
    labels: tuple[str, ...]
    configured: ParameterCount | None = None

    @property
    def is_quantized(self) -> bool:
        return self.quantization_method is not None

    @property
    def kv_elements_per_layer_token(self) -> int | None:
        """Elements of keys and values that one layer stores per token; None for models without attention caches."""
        if self.num_kv_heads is None or self.head_dim is None or self.value_head_dim is None:
            return None
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)


def read_facts(folder: Path) -> ModelFacts:
    """The facts of a prepared folder; raises CorruptArtifact or UnsafeWeights where it may not be opened."""
    contents = check_model_folder(folder)
    tensors = {key: entry for name in contents.weight_files for key, entry in read_header(folder / name).items()}
    facts = facts_of_config(contents.config, read_json_if_present(folder / "generation_config.json"))
    tokenizer = read_json_if_present(folder / "tokenizer_config.json")
    has_output_table = any(key.endswith(_OUTPUT_TABLES) for key in tensors)
    return replace(
        facts,
        num_parameters=sum(entry.num_elements for entry in tensors.values() if entry.dtype not in _BUFFER_DTYPES),
        weight_bytes=sum(entry.num_bytes for entry in tensors.values()),
        dtype=_config_dtype(contents.config) or _stored_dtype(tensors.values()),
        has_tokenizer=(folder / FAST_TOKENIZER).is_file(),
        has_chat_template=(folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template")),
        ties_embeddings=not has_output_table if (ties := _ties_embeddings(contents.config)) is None else ties,
    )


def facts_of_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelFacts:
    """The facts of a configuration without weights: sizes of zero, and the dtype the configuration names (float32 if
    none).
    """
    reader = UntrustedValues(config)
    text = UntrustedValues({**config, **_text_config(config)})
    generation_reader = UntrustedValues(generation or {}, file="generation_config.json")
    heads = text.count(*_HEAD_KEYS, "decoder_attention_heads")
    hidden = text.count(*_HIDDEN_KEYS)
    key_dim, value_dim = _head_dims(text, hidden, heads)
    layers = _num_layers(text, bool(config.get("is_encoder_decoder")))
    window = _sliding_window(text)
    labels = _labels(config)
    return ModelFacts(
        model_type=reader.text("model_type"),
        architectures=tuple(str(name) for name in config.get("architectures") or ()),
        family=_family(config),
        is_generative=is_generative(config),
        context_tokens=_context_tokens(text),
        sliding_window_tokens=window,
        vocab_size=text.count("vocab_size"),
        dtype=_config_dtype(config) or "float32",
        bos_token_id=_first_token_id("bos_token_id", generation_reader, text),
        eos_token_ids=generation_reader.token_ids("eos_token_id") or text.token_ids("eos_token_id"),
        pad_token_id=_first_token_id("pad_token_id", generation_reader, text),
        generation=_generation_defaults(generation_reader),
        num_parameters=0,
        weight_bytes=0,
        has_tokenizer=False,
        has_chat_template=False,
        quantization_method=_quantization_method(config),
        ties_embeddings=_ties_embeddings(config) is not False,
        num_layers=layers,
        num_sliding_layers=_num_sliding_layers(text, layers, window),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(text, heads),
        head_dim=key_dim,
        value_head_dim=value_dim,
        hidden_size=hidden,
        intermediate_size=text.count(*_INNER_KEYS) or (4 * hidden if hidden else None),
        num_labels=len(labels) or None,
        labels=labels,
        configured=count_parameters_of(config),
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _family(config: Mapping[str, Any]) -> Family:
    if config.get("is_encoder_decoder"):
        return Family.ENCODER_DECODER
    model_type = _text_config(config).get("model_type", config.get("model_type"))
    if is_generative(config) or model_type in _DECODER_TYPES or config.get("is_decoder"):
        return Family.DECODER
    return Family.ENCODER


def _context_tokens(text: UntrustedValues) -> int | None:
    tokens = text.count(*_CONTEXT_KEYS)
    if (turning := _turning_tokens(text)) is not None:
        return min(turning, tokens or turning)
    if tokens is None or text.values.get("model_type") not in _OFFSET_POSITION_TYPES:
        return tokens or None
    padding = text.token_ids("pad_token_id")
    return tokens - (padding[0] if padding else 1) - 1


def _turning_tokens(text: UntrustedValues) -> int | None:
    """How long a sequence may be before LongRoPE turns all of its positions otherwise, those that were computed and
    kept included, and with them every other sequence of the batch. None without LongRoPE.
    """
    for key in ("rope_parameters", "rope_scaling"):
        values = text.values.get(key)
        if isinstance(values, dict) and values.get("rope_type", values.get("type")) in _LONG_ROPE:
            return UntrustedValues(values).count(_TURNING) or text.count(_TURNING) or None
    return None


def _ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """None where the configuration leaves it to the default of its class."""
    value = config.get("tie_word_embeddings", _text_config(config).get("tie_word_embeddings"))
    return value if isinstance(value, bool) else None


def _sliding_window(text: UntrustedValues) -> int | None:
    if text.values.get("use_sliding_window") is False:
        return None
    return text.count("sliding_window") or None


def _num_layers(text: UntrustedValues, is_encoder_decoder: bool) -> int | None:
    decoder = ("num_decoder_layers", "decoder_layers") if is_encoder_decoder else ()
    return text.count(*decoder, *_LAYER_KEYS)


def _num_sliding_layers(text: UntrustedValues, layers: int | None, window: int | None) -> int:
    if window is None or layers is None:
        return 0
    kinds = text.values.get("layer_types")
    if isinstance(kinds, list):
        return kinds.count("sliding_attention")
    # Configurations older than layer_types: every n-th layer sees everything (Gemma 2: every second, Gemma 3: sixth).
    default = {"gemma2": 2, "gemma3_text": 6}.get(str(text.values.get("model_type")), 0)
    pattern = text.count("sliding_window_pattern") or default
    return layers - layers // pattern if pattern else layers


def _num_kv_heads(text: UntrustedValues, heads: int | None) -> int | None:
    if text.values.get("multi_query") is True and not text.values.get("new_decoder_architecture"):
        return 1
    return text.count("num_key_value_heads", "num_kv_heads") or heads


def _head_dims(text: UntrustedValues, hidden: int | None, heads: int | None) -> tuple[int | None, int | None]:
    """Width of one head's keys and values; they differ in multi-head latent attention, which caches them expanded."""
    if text.values.get("kv_lora_rank") is not None:
        key_dim = (text.count("qk_nope_head_dim") or 0) + (text.count("qk_rope_head_dim") or 0)
        return key_dim, text.count("v_head_dim")
    dim = text.count("head_dim", "d_kv") or (hidden // heads if hidden and heads else None)
    return dim, dim


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        return ()
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _config_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype as version 5 (``dtype``) or 4 (``torch_dtype``) writes it."""
    for source in (config, _text_config(config)):
        value = source.get("dtype", source.get("torch_dtype"))
        if isinstance(value, str) and value.removeprefix("torch.") in _DTYPES.values():
            return value.removeprefix("torch.")
    return None


def _stored_dtype(tensors: Iterable[TensorEntry]) -> str:
    counts = Counter[str]()
    for entry in tensors:
        if entry.dtype in _DTYPES:
            counts[_DTYPES[entry.dtype]] += entry.num_elements
    return counts.most_common(1)[0][0] if counts else "float32"


def _quantization_method(config: Mapping[str, Any]) -> str | None:
    stored = config.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise CorruptArtifact("config.json: quantization_config is no object")
    # bitsandbytes stores several kinds, and its first configurations named no method.
    if stored.get("load_in_4bit"):
        return "nf4" if stored.get("bnb_4bit_quant_type") == "nf4" else "fp4"
    return "int8" if stored.get("load_in_8bit") else str(stored.get("quant_method", "unknown"))


def _first_token_id(key: str, *readers: UntrustedValues) -> int | None:
    return next((ids[0] for reader in readers if (ids := reader.token_ids(key))), None)


_FLAGS = frozenset({"do_sample"})
_NUMBERS = frozenset({"temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"})
_TOKEN_KEYS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
_NOT_GENERATION = frozenset({"transformers_version", "_from_model_config", "use_cache"})


def _generation_defaults(reader: UntrustedValues) -> GenerationDefaults:
    known: dict[str, Any] = {}
    for item in fields(GenerationDefaults):
        if item.name in _FLAGS:
            known[item.name] = reader.flag(item.name)
        elif item.name in _NUMBERS:
            known[item.name] = reader.number(item.name)
        elif item.name != "other":
            known[item.name] = reader.count(item.name)
    skipped = known.keys() | _TOKEN_KEYS | _NOT_GENERATION
    other = {
        key: value
        for key, value in reader.values.items()
        if key not in skipped and value is not None and value is not False
    }
    return GenerationDefaults(**known, other=other)
