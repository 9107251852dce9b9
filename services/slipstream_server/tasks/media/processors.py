"""What turns raw input into a model's tensors: tokenizer, image processor and the like, read from the model's folder.

Each of Transformers' pipelines says which it needs (True), takes if there (None) or never uses (False). Only the
prepared folder is read: no network, no code of the model's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from slipstream_server.errors import MissingDependency, ModelLoadFailed
from slipstream_server.models.missing import missing_package

_LOADERS = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "video_processor": "AutoVideoProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "processor": "AutoProcessor",
}


def load_processors(pipeline_class: Any, folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keyword arguments of ``pipeline_class`` that hold processors. Raises ModelLoadFailed or MissingDependency."""
    loaded = {}
    for name, loader in _LOADERS.items():
        need = getattr(pipeline_class, f"_load_{name}", False)
        if need is False or name in without:
            continue
        loaded[name] = _load(getattr(transformers, loader), folder, name, required=bool(need))
    return loaded


def _load(loader: Any, folder: Path, name: str, *, required: bool) -> Any:
    try:
        return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of file that is missing or odd raises its own
        if not required:
            return None
        if (package := missing_package(error)) is not None or isinstance(error, ImportError):
            text = f"the model's {name} needs a package that is not installed on this server"
            raise MissingDependency(f"{text}: {package}" if package else text) from error
        raise ModelLoadFailed(f"the model's {name} cannot be loaded ({type(error).__name__})") from error
