"""Our runner in batches and Transformers' own pipeline, on the same model."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from PIL import Image

from slipstream_server.tasks import items
from unit.tasks.media import tiny_media as tiny

PICTURES = [(1, 40, 32), (2, 40, 32), (3, 36, 44)]
LABELS = ("cat", "dog", "red photo")


def batched(runner: Any, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> tuple[list[Any], int]:
    """The results, and the size of the largest batch: pieces of one group run together."""
    groups: dict[Any, list[tuple[int, int, Any]]] = defaultdict(list)
    for index, item in enumerate(inputs):
        for place, piece in enumerate(runner.prepare(item, parameters)):
            assert piece.size >= 1
            groups[piece.group].append((index, place, piece))
    raw: dict[int, dict[int, Any]] = defaultdict(dict)
    for members in groups.values():
        for (index, place, _), result in zip(members, runner.run([piece for *_, piece in members]), strict=True):
            raw[index][place] = result
    results = [
        runner.finish(item, parameters, [raw[index][place] for place in sorted(raw[index])])
        for index, item in enumerate(inputs)
    ]
    return results, max(len(members) for members in groups.values())


def plain(task: str, model: Any, folder: Path, *names: str, **more: Any) -> Any:
    loaders = {
        "tokenizer": hf.AutoTokenizer,
        "image_processor": hf.AutoImageProcessor,
        "feature_extractor": hf.AutoFeatureExtractor,
        "processor": hf.AutoProcessor,
    }
    parts = {name: loaders[name].from_pretrained(folder) for name in names}
    return hf.pipeline(task, model=model, device="cpu", **parts, **more)


def pixels(image: Any) -> np.ndarray:
    opened = Image.open(io.BytesIO(image.png))
    assert opened.size == (image.width_pixels, image.height_pixels)
    return np.asarray(opened)


def pictures() -> list[Any]:
    return [items.ImageInput(data=tiny.png(*size)) for size in PICTURES]
