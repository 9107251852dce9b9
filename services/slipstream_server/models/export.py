"""Writes a model out anew: ``python -m slipstream_server.models.export``.

A subprocess (see ``tool_side``), because it imports torch and holds the whole model. Merges an adapter into weights of
at least float32, whatever they are stored as, and casts afterwards; saves by save_pretrained, in shards.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from slipstream_server.errors import IncompatibleAdapter, ModelLoadFailed, SlipstreamError
from slipstream_server.models.folder import check_adapter_folder
from slipstream_server.models.tool_side import answer, tell


def export(request: Mapping[str, Any]) -> dict[str, Any]:
    """``source``, ``target`` (an empty folder), ``adapter`` (a folder or nothing), ``dtype``, ``max_shard_bytes``."""
    dtype = getattr(torch, request["dtype"])
    tell("loading weights")
    model = _load(Path(request["source"]), dtype, is_merged=bool(request["adapter"]))
    if request["adapter"]:
        tell("merging")
        model = _merged(model, Path(request["adapter"])).to(dtype)
    tell("saving")
    model.save_pretrained(request["target"], max_shard_size=request["max_shard_bytes"])
    return {"transformers": transformers.__version__}


def _load(source: Path, dtype: torch.dtype, *, is_merged: bool) -> Any:
    place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **place)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if model_class is None:
        raise ModelLoadFailed(f"this transformers has no {str(names[0])[:80]!r}")
    working = dtype if not is_merged or dtype == torch.float64 else torch.float32
    model, report = model_class.from_pretrained(
        source, config=config, dtype=working, use_safetensors=True, output_loading_info=True, local_files_only=True
    )
    values = report if isinstance(report, dict) else vars(report)
    if missing := sorted(values.get("missing_keys") or ()):
        raise ModelLoadFailed(f"the stored weights lack {missing[0]} ({len(missing)} tensors)")
    return model


def _merged(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    check_adapter_folder(folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True, use_safetensors=True)
        return adapted.merge_and_unload(safe_merge=True)
    except SlipstreamError:
        raise
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        if "allocate" in str(error) or "No space" in str(error):
            raise
        raise IncompatibleAdapter(f"the adapter cannot be merged into the model ({type(error).__name__})") from error


if __name__ == "__main__":
    sys.exit(answer(export))
