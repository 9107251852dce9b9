"""Writes a trained adapter as other machines may read it: safetensors, and a configuration that is the same bytes for
the same training.

PEFT saves module names in the order of a set and names the base by the folder it was loaded from; both would make equal
adapters differ. In the runner only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel

from slipstream_server.training.job_folder import FileDigest, digest_folder, sync_files, sync_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def write_adapter(model: PeftModel, folder: Path, *, base_model_name: str) -> tuple[FileDigest, ...]:
    """Put the adapter into ``folder``, which then holds its two files and nothing else, or is left as it was."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        for path in partial.iterdir():
            if path.name not in (CONFIG, WEIGHTS):
                path.unlink()
        config = json.loads((partial / CONFIG).read_bytes())
        (partial / CONFIG).write_bytes(_encode(canonical_config(config, base_model_name)))
        sync_files(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest_folder(folder)


def canonical_config(config: Mapping[str, Any], base_model_name: str) -> dict[str, Any]:
    """``config`` with sorted lists of names and the portable name of its base."""
    sorted_lists = {
        key: sorted(config[key])
        for key in ("target_modules", "modules_to_save", "exclude_modules")
        if isinstance(config.get(key), list)
    }
    return {
        **config,
        **sorted_lists,
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
    }


def _encode(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
