"""How a model is to be loaded, as the operator or a request says it.

Understands the spellings of transformers 4 as well (``torch_dtype``, ``load_in_8bit``). Free of torch: the front parses
and validates these options, the worker acts on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from slipstream_server.errors import InvalidField


class Quantization(StrEnum):
    """Quantization of the linear layers while loading (bitsandbytes)."""

    NONE = "none"
    EIGHT_BIT = "8bit"
    FOUR_BIT = "4bit"


class FourBitKind(StrEnum):
    NF4 = "nf4"
    FP4 = "fp4"


DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "sequential")
_DTYPE_SPELLINGS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_QUANTIZATION_SPELLINGS = {
    "none": (Quantization.NONE, None),
    "8bit": (Quantization.EIGHT_BIT, None),
    "int8": (Quantization.EIGHT_BIT, None),
    "4bit": (Quantization.FOUR_BIT, None),
    "nf4": (Quantization.FOUR_BIT, FourBitKind.NF4),
    "fp4": (Quantization.FOUR_BIT, FourBitKind.FP4),
}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
# No slash: transformers would download and run a repository of kernels of that name.
_ATTENTION = re.compile(r"auto|[a-z][a-z0-9_]{0,63}")
_TASK = re.compile(r"[a-z][a-z0-9-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Everything that decides how a prepared folder becomes a model in memory. Raises InvalidField on a bad value.

    ``dtype`` "auto" takes the checkpoint's own. ``device_map`` spreads the layers over all devices and needs ``device``
    "auto". ``task`` picks the head; None takes what the checkpoint's architecture says. ``adapter_folder`` is a checked
    PEFT folder. ``allow_new_weights`` permits freshly initialised weights where the checkpoint has none (a new head,
    before training).
    """

    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    quantization: Quantization = Quantization.NONE
    four_bit_kind: FourBitKind = FourBitKind.NF4
    double_quantization: bool = False
    compute_dtype: str = "auto"
    attn_implementation: str = "auto"
    task: str | None = None
    adapter_folder: Path | None = None
    allow_new_weights: bool = False

    def __post_init__(self) -> None:
        _require(_DEVICE.fullmatch(self.device), "device", self.device, "auto, cpu, cuda or cuda:N")
        _require(self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))
        _require(self.compute_dtype in DTYPES, "compute_dtype", self.compute_dtype, ", ".join(DTYPES))
        _require(self.device_map in (None, *DEVICE_MAPS), "device_map", self.device_map, ", ".join(DEVICE_MAPS))
        _require(
            _ATTENTION.fullmatch(self.attn_implementation), "attn_implementation", self.attn_implementation,
            "auto, sdpa, eager, flash_attention_2 or another built-in name",
        )  # fmt: skip
        _require(self.task is None or _TASK.fullmatch(self.task), "task", self.task, "a task name")
        if self.device_map is not None and self.device != "auto":
            raise InvalidField.of("device", f"{self.device!r} and device_map {self.device_map!r} exclude each other")


def parse_load_options(values: Mapping[str, Any], *, adapter_folder: Path | None = None) -> LoadOptions:
    """LoadOptions from the words of a command line or a request.

    Raises InvalidField on a word it does not know and on contradictions.
    """
    rest = {key: value for key, value in values.items() if value is not None}
    quantization, kind = _parse_quantization(rest)
    options = LoadOptions(
        device=_take_text(rest, "device", "auto"),
        dtype=parse_dtype(_take_dtype(rest), "dtype"),
        device_map=_take_text(rest, "device_map", "none").replace("none", "") or None,
        quantization=quantization,
        four_bit_kind=kind,
        double_quantization=_take_flag(rest, "bnb_4bit_use_double_quant", "double_quantization"),
        compute_dtype=parse_dtype(
            rest.pop("bnb_4bit_compute_dtype", rest.pop("compute_dtype", "auto")), "compute_dtype"
        ),
        attn_implementation=_take_text(rest, "attn_implementation", "auto"),
        task=rest.pop("task", None),
        adapter_folder=adapter_folder,
    )
    if rest:
        name = sorted(rest)[0]
        raise InvalidField.of(name, "is no option of loading a model")
    return options


def parse_dtype(value: Any, field: str) -> str:
    """One of DTYPES from any usual spelling: ``torch.bfloat16``, ``bf16``, ``half``, or a torch.dtype itself."""
    text = str(value).lower().removeprefix("torch.")
    text = _DTYPE_SPELLINGS.get(text, text)
    _require(text in DTYPES, field, value, ", ".join(DTYPES))
    return text


def _take_dtype(rest: dict[str, Any]) -> Any:
    old, new = rest.pop("torch_dtype", None), rest.pop("dtype", None)
    if old is not None and new is not None and parse_dtype(old, "torch_dtype") != parse_dtype(new, "dtype"):
        raise InvalidField.of("torch_dtype", f"{old!r} contradicts dtype {new!r}")
    return new if new is not None else old if old is not None else "auto"


def _parse_quantization(rest: dict[str, Any]) -> tuple[Quantization, FourBitKind]:
    word = str(rest.pop("quantization", "none")).lower()
    _require(word in _QUANTIZATION_SPELLINGS, "quantization", word, ", ".join(_QUANTIZATION_SPELLINGS))
    quantization, kind = _QUANTIZATION_SPELLINGS[word]
    asked = {quantization} - {Quantization.NONE}
    if _take_flag(rest, "load_in_8bit"):
        asked.add(Quantization.EIGHT_BIT)
    if _take_flag(rest, "load_in_4bit"):
        asked.add(Quantization.FOUR_BIT)
    if len(asked) > 1:
        raise InvalidField.of("quantization", "8bit and 4bit exclude each other")
    kind_word = str(rest.pop("bnb_4bit_quant_type", rest.pop("four_bit_kind", kind or FourBitKind.NF4))).lower()
    _require(kind_word in set(FourBitKind), "bnb_4bit_quant_type", kind_word, "nf4, fp4")
    if kind is not None and kind_word != kind:
        raise InvalidField.of("bnb_4bit_quant_type", f"{kind_word!r} contradicts quantization {word!r}")
    return (asked.pop() if asked else Quantization.NONE), FourBitKind(kind_word)


def _take_text(rest: dict[str, Any], key: str, default: str) -> str:
    value = rest.pop(key, default)
    _require(isinstance(value, str), key, value, "text")
    return str(value)


def _take_flag(rest: dict[str, Any], *keys: str) -> bool:
    values = [rest.pop(key) for key in keys if key in rest]
    for value in values:
        _require(isinstance(value, bool), keys[0], value, "true, false")
    return any(values)


def _require(condition: object, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise InvalidField.of(field, f"{str(value)[:80]!r} is not allowed; allowed: {allowed}")
