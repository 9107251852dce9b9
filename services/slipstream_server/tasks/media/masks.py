"""mask-generation: every area of a picture that a SAM-like model finds by asking it about a grid of points.

Transformers' pipeline takes one function of torchvision, the suppression of boxes that overlap better ones. Here it
stands written out, so that SAM and SAM-HQ run without that package, which fits one release of torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import MaskGenerationPipeline

from slipstream_server.tasks.items import (
    Box,
    GeneratedMask,
    ImageInput,
    MaskGenerationResult,
    TaskInput,
    TaskResult,
)
from slipstream_server.tasks.media.images import decode_image, encode_mask
from slipstream_server.tasks.media.pipelines import PIXELS_PER_TOKEN, Alone, Parameters, given
from slipstream_server.tasks.runner import Piece

# Without crop_n_points_downscale_factor: Transformers 5.23 fails wherever two layers' grids are not of one size.
_ARGUMENTS = (
    "points_per_crop",
    "crops_n_layers",
    "crop_overlap_ratio",
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
    "mask_threshold",
    "crops_nms_thresh",
)
MAX_PIXELS = 16_000_000
MAX_MASK_BYTES = 2 * 1024**3
_MASKS_PER_POINT = 3


class LoneMaskPipeline(MaskGenerationPipeline):  # type: ignore[misc]
    """As Transformers' own up to the masks that the model is sure of; then the better of those that overlap stay.

    They stay as lengths of runs: thousands of large masks may be asked for, and as pixels they do not fit in memory.
    """

    def _forward(self, *inputs: Any, **parameters: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._forward(*inputs, **parameters)
        for runs in output["masks"]:
            runs["counts"] = np.asarray(runs["counts"], dtype=np.int32)  # a ninth of what a list of numbers takes
        return output

    def postprocess(
        self, model_outputs: Sequence[dict[str, Any]], crops_nms_thresh: float = 0.7, **ignored: Any
    ) -> list[tuple[dict[str, Any], float, list[float]]]:
        masks = [runs for output in model_outputs for runs in output["masks"]]
        scores_N = torch.cat([output["iou_scores"] for output in model_outputs]).float().cpu()
        boxes_N4 = torch.cat([output["boxes"] for output in model_outputs]).float().cpu()
        return [
            (masks[place], float(scores_N[place]), boxes_N4[place].tolist())
            for place in without_worse_twins(boxes_N4, scores_N, crops_nms_thresh)
        ]


def without_worse_twins(boxes_N4: torch.Tensor, scores_N: torch.Tensor, most_overlap: float) -> list[int]:
    """Places of the boxes, best first, that no better one overlaps by more than ``most_overlap``.

    Overlap is the share of the common area in that of both together; boxes are left, upper, right and lower edge.
    """
    kept, left_over = [], torch.argsort(scores_N, descending=True, stable=True)
    areas_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    while len(left_over):
        best, left_over = int(left_over[0]), left_over[1:]
        kept.append(best)
        upper_left = torch.maximum(boxes_N4[left_over, :2], boxes_N4[best, :2])
        lower_right = torch.minimum(boxes_N4[left_over, 2:], boxes_N4[best, 2:])
        common = (lower_right - upper_left).clamp(min=0).prod(dim=1)
        # 0 / 0 is no overlap: nothing is greater than not-a-number, and less is not asked.
        overlap = common / (areas_N[left_over] + areas_N[best] - common)
        left_over = left_over[~(overlap > most_overlap)]
    return kept


def unrolled(runs: dict[str, Any]) -> np.ndarray:
    """A mask [H, W] from the lengths of its runs of 0 and 1 in turn, down the columns."""
    height, width = runs["size"]
    values = np.arange(len(runs["counts"])) % 2 == 1
    return np.repeat(values, runs["counts"]).reshape(width, height).T


class MaskRunner:
    """The pipeline asks the model for the picture's embedding while it preprocesses, so that all of it is ``run``."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def prepare(self, item: TaskInput, parameters: Parameters) -> Sequence[Piece]:
        assert isinstance(item, ImageInput)
        image = decode_image(item.data, "image.data", max_pixels=MAX_PIXELS)
        pixels = image.width * image.height
        arguments = given(parameters, *_ARGUMENTS)
        # Every point's masks are scaled to the picture's size at once: fewer points at a time on larger pictures.
        most = max(1, MAX_MASK_BYTES // (4 * _MASKS_PER_POINT * pixels))
        arguments["points_per_batch"] = min(int(parameters.get("points_per_batch") or 64), most)
        return [Piece(size=max(1, pixels // PIXELS_PER_TOKEN), payload=(image, arguments), group=Alone())]

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return [self._pipeline(image, **arguments) for image, arguments in (piece.payload for piece in pieces)]

    def finish(self, item: TaskInput, parameters: Parameters, raw: Sequence[Any]) -> TaskResult:
        return MaskGenerationResult(
            masks=[
                GeneratedMask(score=score, mask=encode_mask(unrolled(runs)), box=Box(*box))
                for runs, score, box in raw[0]
            ]
        )
