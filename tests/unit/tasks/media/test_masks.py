"""Masks against Transformers' pipeline. Without torchvision that one gets, of the only function it takes from there, a
plain double loop in its place.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from slipstream_server.errors import MissingDependency
from slipstream_server.tasks.media import masks
from slipstream_server.tasks.media.images import encode_mask
from slipstream_server.tasks.media.masks import unrolled, without_worse_twins
from slipstream_server.tasks.media.runners import media_runner
from unit.tasks.media import tiny_media as tiny
from unit.tasks.media.side_by_side import PICTURES, batched, pictures, pixels, plain

ALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


def share_in_common(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0.0) * max(height, 0.0)
    together = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - common
    return common / together if together else 0.0


def nms_by_pairs(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """What torchvision documents of ``batched_nms`` where all boxes are of one class."""
    kept: list[int] = []
    for place in sorted(range(len(scores)), key=lambda each: -float(scores[each])):
        if all(share_in_common(boxes[place].tolist(), boxes[each].tolist()) <= iou_threshold for each in kept):
            kept.append(place)
    return torch.tensor(kept, dtype=torch.long)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def pipeline(model: Any, folder: Path) -> Any:
        pipe = plain("mask-generation", model, folder, "image_processor")
        if not hf.utils.is_torchvision_available():
            from transformers.models.sam.image_processing_pil_sam import _post_process_for_mask_generation

            boxes = ModuleType("torchvision.ops.boxes")
            boxes.batched_nms = nms_by_pairs  # type: ignore[attr-defined]
            for name in ("torchvision", "torchvision.ops"):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
            monkeypatch.setitem(sys.modules, "torchvision.ops.boxes", boxes)
            pipe.image_processor.post_process_for_mask_generation = _post_process_for_mask_generation
        return pipe

    return pipeline


@pytest.mark.parametrize(("maker", "cutoff"), [(tiny.sam, 4.0), (tiny.sam_hq, 8.0)])
@pytest.mark.parametrize(
    "parameters",
    [
        {**ALL, "points_per_crop": 4, "points_per_batch": 5},
        {**ALL, "points_per_crop": 4, "crops_nms_thresh": 0.95},
        {**ALL, "points_per_crop": 3, "crops_n_layers": 1, "crop_overlap_ratio": 0.2},
        {"points_per_crop": 4, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.2, "stability_score_offset": 0.1},
    ],
)
def test_mask_generation(
    made: Any, library: Callable[..., Any], maker: tiny.Maker, cutoff: float, parameters: dict[str, Any]
) -> None:
    model, folder = made(maker)
    parameters = {**parameters, "mask_threshold": cutoff}
    runner = media_runner("mask-generation", model, folder, torch.device("cpu"))
    results, largest = batched(runner, pictures(), parameters)
    assert largest == 1
    pipe = library(model, folder)
    assert any(len(result.masks) > 1 for result in results)
    for size, result in zip(PICTURES, results, strict=True):
        expected = pipe(tiny.picture(*size), output_bboxes_mask=True, **parameters)
        assert [each.score for each in result.masks] == pytest.approx(expected["scores"].tolist(), abs=1e-4)
        for found, mask, box in zip(result.masks, expected["masks"], expected["bounding_boxes"], strict=True):
            assert ((pixels(found.mask) > 0) == np.asarray(mask)).mean() > 0.99
            assert [found.box.x_min, found.box.y_min, found.box.x_max, found.box.y_max] == box.tolist()


def test_masks_are_kept_as_runs_until_each_is_encoded(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = made(tiny.sam)
    parameters = {**ALL, "points_per_crop": 4, "crops_nms_thresh": 1.0}
    runner = media_runner("mask-generation", model, folder, torch.device("cpu"))
    item = pictures()[0]
    raw = runner.run(runner.prepare(item, parameters))
    assert len(raw[0]) > 1
    for runs, _, _ in raw[0]:
        assert set(runs) == {"size", "counts"}
        assert runs["counts"].itemsize == 4

    alive: list[weakref.ref[Any]] = []

    def watched(mask: np.ndarray) -> Any:
        assert all(each() is None for each in alive)
        alive.append(weakref.ref(mask))
        return encode_mask(mask)

    monkeypatch.setattr(masks, "encode_mask", watched)
    runner.finish(item, parameters, raw)
    assert len(alive) == len(raw[0])


def test_the_better_of_two_alike_stays() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 5], [5, 5, 5, 5]]).float()
    scores = torch.tensor([0.5, 0.9, 0.7, 0.8, 0.1])
    assert without_worse_twins(boxes, scores, 0.7) == [1, 3, 2, 4]  # 0 is 0.9 of 1; 3 is 5/9 of 1
    assert without_worse_twins(boxes, scores, 0.5) == [1, 2, 4]
    assert without_worse_twins(boxes, scores, 1.0) == [1, 3, 2, 0, 4]
    assert without_worse_twins(boxes[:0], scores[:0], 0.7) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_better_of_many(seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 60, (80, 2), generator=dice)
    boxes = torch.cat([corners, corners + torch.randint(0, 40, (80, 2), generator=dice)], dim=1).float()
    scores = torch.rand(80, generator=dice)
    assert without_worse_twins(boxes, scores, 0.3) == nms_by_pairs(boxes, scores, None, 0.3).tolist()


def test_runs_go_down_the_columns() -> None:
    mask = unrolled({"size": [2, 3], "counts": [1, 3, 2]})
    assert mask.astype(int).tolist() == [[0, 1, 0], [1, 1, 0]]
    assert unrolled({"size": [1, 2], "counts": [0, 2]}).all()


@pytest.mark.skipif(hf.utils.is_torchvision_available(), reason="torchvision is there")
def test_a_processor_that_needs_torchvision_is_refused_by_name(made: Any, tmp_path: Path) -> None:
    model, _ = made(tiny.sam)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Sam2ImageProcessor"}')
    with pytest.raises(MissingDependency, match="torchvision"):
        media_runner("mask-generation", model, tmp_path, torch.device("cpu"))
