"""What the tasks on pictures add to their pipelines. Torch only where a pipeline hands tensors over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import (
    Box,
    ClassificationResult,
    DepthResult,
    DetectedObject,
    EmbeddingResult,
    ImageInput,
    ImagePairInput,
    KeypointMatch,
    KeypointMatchingResult,
    LabelScore,
    ObjectDetectionResult,
    Segment,
    SegmentationResult,
    Tensor,
    ZeroShotImageInput,
)
from slipstream_server.tasks.media.images import MAX_IMAGE_PIXELS, decode_image, encode_image
from slipstream_server.tasks.media.pipelines import Parameters, Steps, alone, given

MAX_TENSOR_VALUES = 3_000_000
"""12 MB: what fits into one answer."""
MAX_MASK_BYTES = 4 * 1024**3
"""Segmentation makes a float of every pixel for every label or query before it decides."""


def read_image(pipeline: Any, item: ImageInput, parameters: Parameters) -> Any:
    return decode_image(item.data, "image.data")


def label_scores(pipeline: Any, found: list[dict[str, Any]]) -> ClassificationResult:
    """A pipeline's labels with their ids in the model's head."""
    ids = {label: int(label_id) for label_id, label in reversed(pipeline.model.config.id2label.items())}
    return ClassificationResult(
        labels=[LabelScore(each["label"], float(each["score"]), ids.get(each["label"], -1)) for each in found]
    )


def candidate_scores(candidates: tuple[str, ...], found: list[dict[str, Any]]) -> ClassificationResult:
    """Labels made up by the caller with their places among the candidates."""
    return ClassificationResult(
        labels=[LabelScore(each["label"], float(each["score"]), candidates.index(each["label"])) for each in found]
    )


def hypothesis(template: str | None) -> dict[str, str]:
    """The caller's sentence as the pipelines want it: only the braces that stand for the label mean anything."""
    if template is None:
        return {}
    if "{}" not in template:
        raise InvalidField.of("hypothesis_template", "has no {} where the label goes")
    before, _, after = template.partition("{}")
    return {"hypothesis_template": _escaped(before) + "{}" + _escaped(after)}


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _shape_labels(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> ClassificationResult:
    return label_scores(pipeline, found)


def _scoring(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return given(parameters, "top_k", "function_to_apply")


CLASSIFICATION = Steps(read=read_image, arguments=_scoring, shape=_shape_labels)


# image-feature-extraction


def _pooling(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return {"pool": bool(parameters.get("pool")), "return_tensors": True}


def _shape_vector(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> EmbeddingResult:
    return EmbeddingResult(vector=tensor(found[0]), num_tokens=0)


def tensor(values: Any) -> Tensor:
    array = np.ascontiguousarray(values.detach().cpu().float().numpy(), dtype="<f4")
    if array.size > MAX_TENSOR_VALUES:
        raise InvalidField.of("inputs", f"the result has {array.size} numbers; at most {MAX_TENSOR_VALUES} fit")
    return Tensor(shape=tuple(array.shape), values=array.tobytes())


FEATURES = Steps(read=read_image, arguments=_pooling, shape=_shape_vector)


# Boxes.


def _box(box: Mapping[str, float]) -> Box:
    return Box(float(box["xmin"]), float(box["ymin"]), float(box["xmax"]), float(box["ymax"]))


def _threshold(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return given(parameters, "threshold")


def _shape_objects(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> ObjectDetectionResult:
    objects = [DetectedObject(label=o["label"], score=float(o["score"]), box=_box(o["box"])) for o in found]
    return ObjectDetectionResult(objects=sorted(objects, key=lambda each: -each.score))


DETECTION = Steps(read=read_image, arguments=_threshold, shape=_shape_objects)


def _read_zero_shot_boxes(pipeline: Any, item: ZeroShotImageInput, parameters: Parameters) -> Any:
    if item.hypothesis_template is not None:
        raise InvalidField.of("zero_shot_image.hypothesis_template", "is not used by zero-shot-object-detection")
    image = decode_image(item.image, "zero_shot_image.image.data")
    return {"image": image, "candidate_labels": list(item.candidate_labels)}


def _boxes_arguments(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return given(parameters, "threshold", "top_k")


ZERO_SHOT_DETECTION = Steps(read=_read_zero_shot_boxes, arguments=_boxes_arguments, shape=_shape_objects)


# zero-shot-image-classification


def _read_zero_shot(pipeline: Any, item: ZeroShotImageInput, parameters: Parameters) -> Any:
    return decode_image(item.image, "zero_shot_image.image.data")


def candidates(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return {"candidate_labels": list(item.candidate_labels), **hypothesis(item.hypothesis_template)}


def same_candidates(item: Any, parameters: Parameters) -> tuple[Any, ...]:
    """The pipelines encode the labels once for a batch."""
    return (item.candidate_labels, item.hypothesis_template)


def shape_candidates(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> ClassificationResult:
    return candidate_scores(item.candidate_labels, found)


ZERO_SHOT = Steps(read=_read_zero_shot, arguments=candidates, company=same_candidates, shape=shape_candidates)


# image-segmentation


def _read_to_segment(pipeline: Any, item: ImageInput, parameters: Parameters) -> Any:
    config = pipeline.model.config
    layers = max(int(getattr(config, "num_queries", 0) or 0), int(config.num_labels))
    return decode_image(item.data, "image.data", max_pixels=min(MAX_IMAGE_PIXELS, MAX_MASK_BYTES // (4 * layers)))


def _segmentation(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    names = ("subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold")
    return given(parameters, *names)


def _shape_segments(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> SegmentationResult:
    return SegmentationResult(
        segments=[
            Segment(
                label=each["label"],
                score=None if each["score"] is None else float(each["score"]),
                mask=encode_image(each["mask"]),
            )
            for each in found
        ]
    )


SEGMENTATION = Steps(read=_read_to_segment, arguments=_segmentation, shape=_shape_segments)


# depth-estimation


def _read_for_depth(pipeline: Any, item: ImageInput, parameters: Parameters) -> Any:
    image = decode_image(item.data, "image.data")
    if parameters.get("return_tensor", True) and image.width * image.height > MAX_TENSOR_VALUES:
        raise InvalidField.of(
            "image.data",
            f"{image.width} x {image.height} pixels; return_tensor has to be off for more than {MAX_TENSOR_VALUES}",
        )
    return image


def _shape_depth(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> DepthResult:
    numbers = tensor(found["predicted_depth"]) if parameters.get("return_tensor", True) else None
    return DepthResult(depth=encode_image(found["depth"]), predicted_depth=numbers)


DEPTH = Steps(read=_read_for_depth, shape=_shape_depth)


# keypoint-matching


def _read_pair(pipeline: Any, item: ImagePairInput, parameters: Parameters) -> Any:
    return [
        decode_image(item.first, "image_pair.first.data"),
        decode_image(item.second, "image_pair.second.data"),
    ]


def _shape_matches(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> KeypointMatchingResult:
    return KeypointMatchingResult(
        matches=[
            KeypointMatch(_point(m["keypoint_image_0"]), _point(m["keypoint_image_1"]), float(m["score"]))
            for m in found
        ]
    )


def _point(point: Mapping[str, float]) -> tuple[float, float]:
    return (float(point["x"]), float(point["y"]))


KEYPOINTS = Steps(read=_read_pair, arguments=_threshold, company=alone, shape=_shape_matches)
