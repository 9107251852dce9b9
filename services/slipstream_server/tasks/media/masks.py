"""mask-generation: every area of a picture that a SAM-like model finds by asking it about a grid of points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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

_ARGUMENTS = (
    "points_per_crop",
    "crops_n_layers",
    "crop_overlap_ratio",
    "crop_n_points_downscale_factor",
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
    "mask_threshold",
    "crops_nms_thresh",
)
MAX_PIXELS = 16_000_000
MAX_MASK_BYTES = 2 * 1024**3
_MASKS_PER_POINT = 3


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
        return [self._run(*piece.payload) for piece in pieces]

    def _run(self, image: Any, arguments: dict[str, Any]) -> Any:
        found = self._pipeline(image, output_bboxes_mask=True, **arguments)
        return (
            [np.asarray(mask) for mask in found["masks"]],
            np.asarray(found["scores"].float()).tolist(),
            np.asarray(found["bounding_boxes"].float()).tolist(),
        )

    def finish(self, item: TaskInput, parameters: Parameters, raw: Sequence[Any]) -> TaskResult:
        masks, scores, boxes = raw[0]
        found = [
            GeneratedMask(score=score, mask=encode_mask(mask_HW), box=Box(*box))
            for mask_HW, score, box in zip(masks, scores, boxes, strict=True)
        ]
        return MaskGenerationResult(masks=sorted(found, key=lambda each: -each.score))
