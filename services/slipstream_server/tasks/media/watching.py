"""video-classification: frames of a film, evenly spaced, to labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import VideoClassificationPipeline

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import ClassificationResult, VideoInput
from slipstream_server.tasks.media.films import decode_film
from slipstream_server.tasks.media.pipelines import Parameters, Steps, given
from slipstream_server.tasks.media.vision import label_scores


class FilmClassificationPipeline(VideoClassificationPipeline):  # type: ignore[misc]
    """Takes frames that are decoded already."""

    def preprocess(self, frames_THWC: np.ndarray, **ignored: Any) -> Any:
        if self.video_processor is None:
            return self.image_processor(list(frames_THWC), return_tensors="pt").to(self.dtype)
        made = self.video_processor(list(frames_THWC), do_sample_frames=False, return_tensors="pt")
        return made.to(self.dtype)


def _read_film(pipeline: Any, item: VideoInput, parameters: Parameters) -> Any:
    own_frames = getattr(pipeline.model.config, "num_frames", None) or pipeline.model.config.frames_per_clip
    num_frames = int(parameters.get("num_frames") or own_frames)
    if num_frames != own_frames and pipeline.model.config.model_type in ("videomae", "vivit"):
        raise InvalidField.of("parameters.num_frames", f"{num_frames}; this model reads {own_frames} frames")
    step = int(parameters.get("frame_sampling_rate") or 1)
    indices = np.linspace(0, num_frames * step - 1, num=num_frames, dtype=np.int64)
    return decode_film(item.data, [int(index) for index in indices], "video.data")


def _scoring(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return given(parameters, "top_k", "function_to_apply")


def _shape_labels(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> ClassificationResult:
    return label_scores(pipeline, found)


FILM_CLASSIFICATION = Steps(read=_read_film, arguments=_scoring, shape=_shape_labels)
