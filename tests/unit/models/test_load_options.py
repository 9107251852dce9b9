from __future__ import annotations

from typing import Any

import pytest

from slipstream_server.errors import InvalidField
from slipstream_server.models.load_options import FourBitKind, LoadOptions, Quantization, parse_load_options


def test_nothing_said_means_defaults() -> None:
    assert parse_load_options({}) == LoadOptions()


@pytest.mark.parametrize("spelling", ["torch.bfloat16", "bfloat16", "bf16", "BF16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes_in_old_and_new_words(key: str, spelling: str) -> None:
    assert parse_load_options({key: spelling}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("words", "quantization", "kind"),
    [
        ({"load_in_8bit": True}, Quantization.EIGHT_BIT, FourBitKind.NF4),
        ({"quantization": "int8"}, Quantization.EIGHT_BIT, FourBitKind.NF4),
        ({"load_in_4bit": True}, Quantization.FOUR_BIT, FourBitKind.NF4),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, Quantization.FOUR_BIT, FourBitKind.FP4),
        ({"quantization": "fp4"}, Quantization.FOUR_BIT, FourBitKind.FP4),
        ({"quantization": "4bit", "load_in_4bit": True}, Quantization.FOUR_BIT, FourBitKind.NF4),
        ({"load_in_8bit": False}, Quantization.NONE, FourBitKind.NF4),
    ],
)
def test_quantization_in_old_and_new_words(
    words: dict[str, Any], quantization: Quantization, kind: FourBitKind
) -> None:
    options = parse_load_options(words)
    assert (options.quantization, options.four_bit_kind) == (quantization, kind)


def test_everything_together() -> None:
    words = {
        "device_map": "auto", "torch_dtype": "float16", "load_in_4bit": True, "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "torch.bfloat16", "attn_implementation": "sdpa", "task": "text-generation",
    }  # fmt: skip
    assert parse_load_options(words) == LoadOptions(
        device_map="auto", dtype="float16", quantization=Quantization.FOUR_BIT, double_quantization=True,
        compute_dtype="bfloat16",
        attn_implementation="sdpa", task="text-generation",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:-1"}, "device"),
        ({"device": 0}, "device"),
        ({"device": "cpu", "device_map": "auto"}, "device"),
        ({"dtype": "float8"}, "dtype"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "torch_dtype"),
        ({"device_map": "disk"}, "device_map"),
        ({"quantization": "gptq"}, "quantization"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "quantization"),
        ({"quantization": "8bit", "load_in_4bit": True}, "quantization"),
        ({"quantization": "nf4", "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type"),
        ({"load_in_8bit": "yes"}, "load_in_8bit"),
        ({"attn_implementation": "org/kernels"}, "attn_implementation"),
        ({"attn_implementation": ""}, "attn_implementation"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"task": "../x"}, "task"),
    ],
)
def test_bad_and_contradictory_words_are_named(words: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField, match=f"^{field}:"):
        parse_load_options(words)
