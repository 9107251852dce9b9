"""Quantizing while loading, by bitsandbytes: what to ask it for, and what to mend afterwards.

Imports torch and transformers; worker side only. On CPUs with AVX512-BF16 bitsandbytes asks a hub for kernels when the
package ``kernels`` is installed: start processes that load models with HF_HUB_OFFLINE=1, so that it gets none.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from slipstream_server.errors import MissingDependency
from slipstream_server.models.load_options import LoadOptions, Quantization

# The packed 4-bit format of the CPU takes rows and columns in these multiples only.
_PACKED_ROWS = 32
_PACKED_COLUMNS = 64


def require_package(name: str, purpose: str) -> None:
    """Raise MissingDependency unless the package ``name`` can be imported here."""
    if importlib.util.find_spec(name) is None:
        raise MissingDependency(f"{purpose}: the package {name} is not installed on this server")


def quantization_config(options: LoadOptions) -> BitsAndBytesConfig:
    """What ``options`` ask of bitsandbytes; raises MissingDependency where it is not installed."""
    require_package("bitsandbytes", "quantization")
    if options.quantization is Quantization.EIGHT_BIT:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = (
        {} if options.compute_dtype == "auto" else {"bnb_4bit_compute_dtype": getattr(torch, options.compute_dtype)}
    )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.four_bit_kind.value,
        bnb_4bit_use_double_quant=options.double_quantization,
        **compute,
    )


def mend_quantized(model: Any) -> None:
    """Work around two habits of bitsandbytes on CPUs.

    Its packed 4-bit format fails in the first forward of a layer whose shape it cannot hold; such layers use the
    plain one. Its 8-bit product warns once per layer and token that it casts its input.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            fits = layer.out_features % _PACKED_ROWS == 0 and layer.in_features % _PACKED_COLUMNS == 0
            layer.support_avx512bf16_for_cpu = fits
