"""Builds a model from an examined configuration: ``python -m slipstream_server.models.make``.

A subprocess (see ``tool_side``), because it imports torch and fills memory. ``count`` builds on the meta device and
tells the parameters; ``create`` initialises the weights from a seed and saves them, with the files of tokenizer and
processor, as a prepared folder.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slipstream_server.errors import InvalidField
from slipstream_server.models.folder import is_generative
from slipstream_server.models.tool_side import answer, tell


def work(request: Mapping[str, Any]) -> dict[str, Any]:
    return count(request) if request["verb"] == "count" else create(request)


def count(request: Mapping[str, Any]) -> dict[str, Any]:
    """``config``, ``architecture``; the parameters in linear layers, and the others. Allocates nothing."""
    with torch.device("meta"):
        model = _build(request)
    model.tie_weights()
    head = model.get_output_embeddings()
    linear = sum(
        layer.weight.numel()
        for layer in model.modules()
        if (isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D") and layer is not head
    )
    return {"linear": linear, "other": sum(weight.numel() for weight in model.parameters()) - linear}


def create(request: Mapping[str, Any]) -> dict[str, Any]:
    """``config``, ``architecture``, ``dtype``, ``seed``, ``target`` (an empty folder), ``files`` (to lie beside)."""
    target = Path(request["target"])
    tell("initialising")
    torch.manual_seed(request["seed"])
    # Drawn in float32 and cast: the same seed gives the same weights, up to rounding, in every type.
    model = _build(request).to(getattr(torch, request["dtype"]))
    if is_generative(request["config"]):
        model.generation_config = _generation_config(model.config)
    tell("saving")
    model.save_pretrained(target, max_shard_size="4GB")
    for path in request["files"]:
        shutil.copyfile(path, target / Path(path).name)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _build(request: Mapping[str, Any]) -> Any:
    config = CONFIG_MAPPING[request["config"]["model_type"]].from_dict(request["config"])
    config.dtype = torch.float32
    try:
        return getattr(transformers, request["architecture"])(config)
    except (ValueError, TypeError, AssertionError, ZeroDivisionError, KeyError, RuntimeError) as error:
        if "allocate" in str(error):
            raise
        words = " ".join(str(error).split())[:300]
        raise InvalidField.of("config_overrides", f"{request['architecture']} cannot be built so: {words}") from error


def _generation_config(config: Any) -> GenerationConfig:
    """Greedy, with the ends that the configuration names; padding falls back to the end token."""
    defaults = GenerationConfig.from_model_config(config)
    if defaults.pad_token_id is None:
        end = defaults.eos_token_id
        defaults.pad_token_id = end[0] if isinstance(end, list) else end
    return defaults


if __name__ == "__main__":
    sys.exit(answer(work))
