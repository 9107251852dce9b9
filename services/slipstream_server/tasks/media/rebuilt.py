"""Pipelines that Transformers 5 has not, or not as they should be: the same three steps on its model classes.

visual-question-answering and image-to-image were removed in 5.0, captions without a prompt with image-to-text. They
behave as in version 4.57. Torch-side code of the worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, KeypointMatchingPipeline, Pipeline, ZeroShotObjectDetectionPipeline

from slipstream_server.errors import UnsupportedField
from slipstream_server.tasks.media.pipelines import DEFAULT_NEW_TOKENS


class VisualQuestionAnsweringPipeline(Pipeline):  # type: ignore[misc]
    """A question and a picture to scored answers of a fixed list (ViLT), or to a written answer (BLIP)."""

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    _non_generation_params = ("top_k",)
    _default_generation_config = GenerationConfig(max_new_tokens=DEFAULT_NEW_TOKENS)

    def _sanitize_parameters(
        self, top_k: int | None = None, **generate: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, generate, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        encoded = self.tokenizer(inputs["question"], return_tensors="pt")
        encoded.update(self.image_processor(images=inputs["image"], return_tensors="pt").to(self.dtype))
        return dict(encoded)

    def _forward(self, model_inputs: dict[str, Any], **generate: Any) -> dict[str, Any]:
        if self.model.can_generate():
            sequences = self.model.generate(**model_inputs, **self._prepare_generate_kwargs(generate))
            return {"sequences": sequences}
        return {"logits": self.model(**model_inputs).logits}

    def postprocess(self, model_outputs: dict[str, Any], top_k: int = 5) -> list[dict[str, Any]]:
        if "sequences" in model_outputs:
            texts = self.tokenizer.batch_decode(model_outputs["sequences"], skip_special_tokens=True)
            return [{"answer": text.strip(), "score": 0.0} for text in texts]
        scores, ids = model_outputs["logits"].sigmoid()[0].topk(min(top_k, self.model.config.num_labels))
        labels = self.model.config.id2label
        return [
            {"answer": labels[label_id], "score": score}
            for score, label_id in zip(scores.tolist(), ids.tolist(), strict=True)
        ]


class ImageToImagePipeline(Pipeline):  # type: ignore[misc]
    """A picture to a larger or cleaner one (Swin2SR)."""

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {}

    def preprocess(self, image: Any) -> Any:
        return self.image_processor(images=[image], return_tensors="pt").to(self.dtype)

    def _forward(self, model_inputs: Any) -> dict[str, Any]:
        return {"reconstruction": self.model(**model_inputs).reconstruction}

    def postprocess(self, model_outputs: dict[str, Any]) -> Any:
        pixels_CHW = model_outputs["reconstruction"][0].float().clamp(0, 1).numpy()
        return Image.fromarray((np.moveaxis(pixels_CHW, 0, -1) * 255.0).round().astype(np.uint8))


class CaptionPipeline(Pipeline):  # type: ignore[misc]
    """A picture, and words to begin with where there are any, to text: models whose processor has no chat template."""

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=DEFAULT_NEW_TOKENS)

    def _sanitize_parameters(self, **generate: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, generate, {}

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = dict(self.image_processor(images=inputs["image"], return_tensors="pt").to(self.dtype))
        if inputs["text"]:
            prepared |= self._prompt(inputs["text"])
        return prepared

    def _prompt(self, text: str) -> dict[str, Any]:
        """Where each kind of model reads a prompt."""
        kind = self.model.config.model_type
        if kind == "git":
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": torch.tensor([[self.tokenizer.cls_token_id, *ids]])}
        if kind == "vision-encoder-decoder":
            raise UnsupportedField.of("multimodal.parts", "this model takes no words beside the picture")
        return {key: value for key, value in self.tokenizer(text, return_tensors="pt").items() if "type" not in key}

    def _forward(self, model_inputs: dict[str, Any], **generate: Any) -> dict[str, Any]:
        pixel_values = model_inputs.pop("pixel_values")
        sequences = self.model.generate(pixel_values, **model_inputs, **self._prepare_generate_kwargs(generate))
        return {"generated_sequence": sequences.reshape(pixel_values.shape[0], -1, sequences.shape[-1])}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"generated_text": self.tokenizer.decode(ids_T, skip_special_tokens=True), "token_ids": ids_T.tolist()}
            for ids_T in model_outputs["generated_sequence"].flatten(0, -2)
        ]


class OneImageDetectionPipeline(ZeroShotObjectDetectionPipeline):  # type: ignore[misc]
    """Zero-shot detection that reads the picture once, not once for each label."""

    def preprocess(self, inputs: dict[str, Any], timeout: float | None = None) -> Iterator[dict[str, Any]]:
        image, labels = inputs["image"], inputs["candidate_labels"]
        target_size = torch.tensor([[image.height, image.width]], dtype=torch.int32)
        features = self.image_processor(image, return_tensors="pt").to(self.dtype)
        for index, label in enumerate(labels):
            yield {
                "is_last": index == len(labels) - 1,
                "target_size": target_size,
                "candidate_label": label,
                **self.tokenizer(label, return_tensors="pt"),
                **features,
            }


class PixelKeypointPipeline(KeypointMatchingPipeline):  # type: ignore[misc]
    """Points in pixels of pictures that are not square too: Transformers 5.23 hands over width and height for height
    and width.
    """

    def preprocess(self, images: Any, timeout: float | None = None) -> dict[str, Any]:
        prepared: dict[str, Any] = super().preprocess(images, timeout=timeout)
        return {**prepared, "target_sizes": [(image.height, image.width) for image in images]}
