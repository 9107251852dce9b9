"""Weights of few bits: those that are stored so, and those that are made so while loading, by bitsandbytes.

Imports torch and transformers; worker side only. On CPUs with AVX512-BF16 bitsandbytes asks a hub for kernels when the
package ``kernels`` is installed: start processes that load models with HF_HUB_OFFLINE=1, so that it gets none.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from slipstream_server.errors import CorruptArtifact, MissingDependency, ModelLoadFailed
from slipstream_server.models.load_options import LoadOptions, Quantization

# The packed 4-bit format of the CPU takes rows and columns in these multiples only.
_PACKED_ROWS = 32
_PACKED_COLUMNS = 64
_MAX_WORDS_CHARS = 300
_BITSANDBYTES_BY_BITS = frozenset({"bitsandbytes_4bit", "bitsandbytes_8bit"})
# What bitsandbytes stores beside the weights that it has quantized, by the method that ``facts`` tells.
_SCALES = {"nf4": ".absmax", "fp4": ".absmax", "int8": ".SCB"}


def require_package(name: str, purpose: str) -> None:
    """Raise MissingDependency unless the package ``name`` can be imported here."""
    if importlib.util.find_spec(name) is None:
        raise MissingDependency(f"{purpose}: the package {name} is not installed on this server")


def check_stored(method: str, stored: Mapping[str, Any], tensor_names: Iterable[str]) -> None:
    """Raise where this build cannot read weights quantized by ``method``, or where they are not stored so; ``stored``
    is the ``quantization_config`` of their configuration.

    transformers passes over a method that it does not know, and finds out about the rest in the first step.
    CorruptArtifact, MissingDependency or ModelLoadFailed.
    """
    if (suffix := _SCALES.get(method)) is not None:
        if not any(name.endswith(suffix) for name in tensor_names):
            raise CorruptArtifact(
                "config.json: quantization_config says that bitsandbytes has quantized the weights, and it has not; "
                "without it they can be quantized while they are loaded"
            )
    elif method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        known = ", ".join(sorted({"bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING} - _BITSANDBYTES_BY_BITS))
        raise ModelLoadFailed(
            f"config.json: quantization_config.quant_method: {method[:60]!a} is no method of transformers "
            f"{transformers.__version__}; it reads {known}"
        )
    try:
        AutoHfQuantizer.from_config(dict(stored), pre_quantized=True).validate_environment(device_map=None)
    except ImportError as error:
        raise MissingDependency(_own_words(error)) from error
    except Exception as error:
        raise ModelLoadFailed(f"config.json: quantization_config: {_own_words(error)}") from error


def _own_words(error: Exception) -> str:
    """What transformers says, unless it may hold a path."""
    words = " ".join(str(error).split())
    return words[:_MAX_WORDS_CHARS] if words and "/" not in words else f"cannot be read here ({type(error).__name__})"


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
