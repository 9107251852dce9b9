"""Reads adapter_config.json of a LoRA adapter, refuses what must not be served, and writes it again in one form only.

The file comes from a stranger, and PEFT does much with what it says: it imports modules, compiles patterns, changes the
base. Everything in it is therefore known by name and either kept, harmless, or refused; what is stored is composed anew
from what was kept (``canonical_bytes``), so that equal adapters have equal bytes. Pure functions; any thread.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from slipstream_server.errors import CorruptArtifact, IncompatibleAdapter, UnsafeWeights

FILE = "adapter_config.json"
MAX_BYTES = 1024 * 1024
MAX_RANK = 1024
MAX_ALPHA = 65536.0
MAX_MODULES = 10_000
MAX_BASE_NAME_CHARS = 512

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
BIASES = ("none", "lora_only", "all")

_MODULE = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*", re.ASCII)
# Initialisations that leave the base as it is; the others subtract from its weights when the adapter is loaded.
_KEEPING_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT imports the module that these keys name.
_IMPORTING = ("auto_map", "megatron_config", "custom_pipelines")
# They tell how the adapter came about or where PEFT would look for classes: nothing that its weights need.
_DROPPED = frozenset(
    {
        "auto_mapping", "peft_version", "inference_mode", "init_lora_weights", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core", "runtime_config",
    }
)  # fmt: skip
# Variants of LoRA that this service does not serve: allowed only where they are off.
_VARIANTS = frozenset(
    {
        "layer_replication", "trainable_token_indices", "velora_config", "alora_invocation_tokens", "use_qalora",
        "monteclora_config", "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
    }
)  # fmt: skip
_KEPT = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "target_modules", "exclude_modules",
        "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "ensure_weight_tying",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfiguration:
    """What adapter_config.json says, checked. ``target_modules`` is None where a pattern chose them, not a list."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...] | None
    modules_to_save: tuple[str, ...]
    bias: str
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    ensure_weight_tying: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    task_type: str
    base_model: str
    base_model_revision: str


def parse(raw: bytes) -> LoraConfiguration:
    """The configuration in ``raw``.

    Raises UnsafeWeights where it asks for code, IncompatibleAdapter where it is no plain LoRA, CorruptArtifact
    otherwise.
    """
    values = _json_object(raw)
    for key in _IMPORTING:
        if values.get(key):
            raise UnsafeWeights(f"{FILE}: {key} would import code, which is never run")
    _refuse_other_methods(values)
    known = _KEPT | _DROPPED | _VARIANTS | set(_IMPORTING)
    for key in values:
        if key not in known:
            raise CorruptArtifact(f"{FILE}: {_shown(key)} is no key of a LoRA configuration")
    read = _Reader(values)
    return LoraConfiguration(
        rank=read.rank("r", values.get("r")),
        alpha=read.alpha("lora_alpha", values.get("lora_alpha", values.get("r"))),
        dropout=read.dropout(),
        target_modules=read.targets(),
        modules_to_save=read.modules("modules_to_save"),
        bias=read.choice("bias", BIASES) or "none",
        use_rslora=read.flag("use_rslora"),
        use_dora=read.flag("use_dora"),
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        ensure_weight_tying=read.flag("ensure_weight_tying"),
        rank_pattern={key: read.rank("rank_pattern", value) for key, value in read.pattern("rank_pattern")},
        alpha_pattern={key: read.alpha("alpha_pattern", value) for key, value in read.pattern("alpha_pattern")},
        task_type=read.choice("task_type", TASK_TYPES),
        base_model=read.text("base_model_name_or_path"),
        base_model_revision=read.text("revision"),
    )


def canonical_bytes(configuration: LoraConfiguration) -> bytes:
    """The only spelling of ``configuration``, as PEFT reads it. ``target_modules`` must be a list by now."""
    assert configuration.target_modules is not None
    values = {
        "peft_type": "LORA",
        "task_type": configuration.task_type or None,
        "base_model_name_or_path": configuration.base_model or None,
        "revision": configuration.base_model_revision or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": configuration.rank,
        "lora_alpha": _plain(configuration.alpha),
        "lora_dropout": _plain(configuration.dropout),
        "target_modules": sorted(configuration.target_modules),
        "modules_to_save": sorted(configuration.modules_to_save) or None,
        "bias": configuration.bias,
        "use_rslora": configuration.use_rslora,
        "use_dora": configuration.use_dora,
        "fan_in_fan_out": configuration.fan_in_fan_out,
        "ensure_weight_tying": configuration.ensure_weight_tying,
        "rank_pattern": dict(configuration.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in configuration.alpha_pattern.items()},
    }
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode("ascii")


def is_path(base: str) -> bool:
    """Whether the name of a base is a place on somebody's disk rather than a hub id or a model's name."""
    return base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1 or base[1:2] == ":"


def _refuse_other_methods(values: Mapping[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise IncompatibleAdapter(f"{FILE}: peft_type is {_shown(values.get('peft_type'))}; only LORA can be served")
    for key in sorted(_VARIANTS):
        if values.get(key):
            raise IncompatibleAdapter(f"{FILE}: {key} is set; adapters with it cannot be served")
    initialization = values.get("init_lora_weights", True)
    if not any(initialization is kept or initialization == kept for kept in _KEEPING_THE_BASE):
        raise IncompatibleAdapter(
            f"{FILE}: init_lora_weights is {_shown(initialization)}, which changes the base's weights; convert the"
            " adapter to a plain LoRA before uploading it"
        )


def _json_object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_BYTES:
        raise CorruptArtifact(f"{FILE}: {len(raw)} bytes; at most {MAX_BYTES} are read")
    try:
        values = json.loads(raw, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise CorruptArtifact(f"{FILE}: not valid JSON with unique keys and finite numbers") from None
    if not isinstance(values, dict):
        raise CorruptArtifact(f"{FILE}: no JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("duplicate keys")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _Reader:
    """Typed access to values that are not to be trusted; a wrong one is CorruptArtifact."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise self._bad(key, value, f"a whole number from 1 to {MAX_RANK}")
        return value

    def alpha(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= MAX_ALPHA:
            raise self._bad(key, value, f"a number above 0 and at most {MAX_ALPHA:g}")
        return float(value)

    def dropout(self) -> float:
        value = self._values.get("lora_dropout") or 0.0
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self._bad("lora_dropout", value, "a number from 0 up to, not including, 1")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value not in (True, False, None) or type(value) not in (bool, type(None)):
            raise self._bad(key, value, "true or false")
        return bool(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self._values.get(key)
        if value is not None and value not in allowed:
            raise self._bad(key, value, f"one of {', '.join(allowed)}")
        return value or ""

    def text(self, key: str) -> str:
        value = self._values.get(key)
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > MAX_BASE_NAME_CHARS or not value.isprintable():
            raise self._bad(key, value, f"at most {MAX_BASE_NAME_CHARS} printable characters")
        return value

    def modules(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        names = [] if value is None else value
        if not isinstance(names, list) or len(names) > MAX_MODULES or not all(_is_module(name) for name in names):
            raise self._bad(key, value, f"a list of at most {MAX_MODULES} names of modules")
        return tuple(sorted(set(names)))

    def targets(self) -> tuple[str, ...] | None:
        """None where PEFT chose by a pattern, by layers or by exclusion: the tensors then tell what was chosen."""
        value = self._values.get("target_modules")
        selective = ("exclude_modules", "layers_to_transform", "layers_pattern")
        if isinstance(value, str) or any(self._values.get(key) not in (None, []) for key in selective):
            return None
        names = self.modules("target_modules")
        if not names:
            raise self._bad("target_modules", value, "a list of 1 or more names of modules")
        return names

    def pattern(self, key: str) -> tuple[tuple[str, Any], ...]:
        """The entries of a mapping that PEFT reads as regular expressions; only plain names are let through."""
        value = self._values.get(key)
        entries = {} if value is None else value
        if not isinstance(entries, dict) or len(entries) > MAX_MODULES or not all(_is_module(name) for name in entries):
            raise self._bad(key, value, "a mapping from plain names of modules")
        return tuple(entries.items())

    def _bad(self, key: str, value: Any, expected: str) -> CorruptArtifact:
        return CorruptArtifact(f"{FILE}: {key} is {_shown(value)}, which is not {expected}")


def _is_module(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= 256 and _MODULE.fullmatch(name) is not None


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _shown(value: Any) -> str:
    return ascii(value)[:80]
