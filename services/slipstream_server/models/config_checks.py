"""Whether the sizes of a configuration make sense together: what its class would build without complaint, or fail at
late and in words of its own. Pure functions over plain values; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from slipstream_server.errors import InvalidField, UnsafeWeights

MAX_PARAMETERS = 10**12
_MAX_LAYERS = 2048
_MAX_SIZE = 2**31 - 1
_MAX_DEPTH = 8
_MAX_VALUES = 20_000
_MAX_TEXT_CHARS = 20_000
# Keys by which a configuration names code; an attention implementation with a slash is a repository of kernels.
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
_ATTENTION_KEYS = frozenset({"attn_implementation", "_attn_implementation"})

_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
_POSITIVE = (
    *_LAYERS, "hidden_size", "n_embd", "d_model", "dim", "num_attention_heads", "n_head", "n_heads", "num_heads",
    "encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads", "head_dim", "d_kv",
    "intermediate_size",
    "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "vocab_size", "embedding_size",
    "max_position_embeddings", "n_positions", "image_size", "patch_size", "num_channels", "num_local_experts",
    "num_experts", "moe_intermediate_size",
)  # fmt: skip
# Width and the heads it is cut into; families whose heads have a width of their own are left out.
_CUT = (
    ("hidden_size", "num_attention_heads"), ("n_embd", "n_head"), ("dim", "n_heads"),
    ("d_model", "encoder_attention_heads"), ("d_model", "decoder_attention_heads"),
)  # fmt: skip
_OWN_HEAD_WIDTH = ("head_dim", "d_kv", "kv_lora_rank")


def check_values(values: Mapping[str, Any], path: str) -> None:
    """Refuse code, numbers that are none, and what is too deep or too long to be a configuration.

    Raises InvalidField, or UnsafeWeights for a key that would import code.
    """
    for number, (place, key, value) in enumerate(_walk(values, path, 0)):
        if number == _MAX_VALUES:
            raise InvalidField.of(path, f"has more than {_MAX_VALUES} values")
        if key in _CODE_KEYS and value:
            raise UnsafeWeights(f"{place}: asks for remote code, which is never run")
        if key in _ATTENTION_KEYS:
            raise UnsafeWeights(f"{place}: is chosen when the model is loaded, and may name code")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidField.of(place, f"{value} is no finite number")
        if isinstance(value, str) and (len(value) > _MAX_TEXT_CHARS or "\0" in value):
            raise InvalidField.of(place, f"is no text of at most {_MAX_TEXT_CHARS} characters without NUL")


def _walk(values: Any, path: str, depth: int) -> Iterator[tuple[str, str, Any]]:
    if depth > _MAX_DEPTH:
        raise InvalidField.of(path, f"is nested more than {_MAX_DEPTH} deep")
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        if isinstance(key, str) and len(key) > 200:
            raise InvalidField.of(path, "has a key of more than 200 characters")
        place = f"{path}.{key}" if isinstance(key, str) else f"{path}[{key}]"
        yield place, str(key), value
        if isinstance(value, Mapping | list):
            yield from _walk(value, place, depth + 1)


def check_sizes(values: Mapping[str, Any], path: str) -> None:
    """Refuse sizes that contradict one another, in ``values`` and in the parts of a composed configuration.

    ``values``: the configuration with every default filled in, but for a head width that nobody chose.
    """
    for key in _POSITIVE:
        value = values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            most = _MAX_LAYERS if key in _LAYERS else _MAX_SIZE
            if not 1 <= value <= most:
                raise InvalidField.of(f"{path}.{key}", f"{value} is not from 1 to {most}")
    if not any(isinstance(values.get(key), int) for key in _OWN_HEAD_WIDTH):
        for width, heads in _CUT:
            _require_multiple(values, width, heads, path)
    _require_multiple(values, "num_attention_heads", "num_key_value_heads", path)
    rows, padding = values.get("vocab_size"), values.get("pad_token_id")
    if isinstance(rows, int) and isinstance(padding, int) and not -rows <= padding < rows:
        raise InvalidField.of(f"{path}.pad_token_id", f"{padding} is no token of a vocabulary of {rows}")
    for key, part in values.items():
        if key.endswith("_config") and isinstance(part, Mapping):
            check_sizes(part, f"{path}.{key}")


def _require_multiple(values: Mapping[str, Any], whole: str, part: str, path: str) -> None:
    left, right = values.get(whole), values.get(part)
    if isinstance(left, int) and isinstance(right, int) and right and left % right:
        raise InvalidField.of(f"{path}.{whole}", f"{left} is not a multiple of {part} ({right})")


def check_vocabulary(config: Mapping[str, Any], num_tokens: int, path: str) -> None:
    """Refuse a table with fewer rows than the tokenizer has tokens."""
    rows = vocabulary_of(config)
    if rows is not None and rows < num_tokens:
        raise InvalidField.of(
            f"{path}.vocab_size", f"{rows} is less than the {num_tokens} tokens of the tokenizer; at least that many"
        )


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Rows of the token table; None for models that read no text."""
    nested = config.get("text_config")
    text = {**config, **nested} if isinstance(nested, Mapping) else config
    rows = text.get("vocab_size")
    return rows if isinstance(rows, int) and not isinstance(rows, bool) else None
