"""image-text-to-text and any-to-any: pictures, sounds and words in, words out.

Models whose processor has a chat template read the parts as one message of a conversation; the others take one picture
and words to go on from (captions).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

import torch
from transformers import GenerationConfig, Pipeline

from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.tasks.items import (
    AudioInput,
    GeneratedText,
    GeneratedTextResult,
    ImageInput,
    MultimodalInput,
    TextInput,
    VideoInput,
)
from slipstream_server.tasks.media.films import decode_film
from slipstream_server.tasks.media.images import decode_image
from slipstream_server.tasks.media.pipelines import (
    DEFAULT_NEW_TOKENS,
    Alone,
    Parameters,
    Steps,
    alone,
    check_drawing,
    given,
)
from slipstream_server.tasks.media.sounds import decode_sound

_FILM_FRAMES = 8
_MAX_PARTS = 64
_GENERATION = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences")


class ConversationPipeline(Pipeline):  # type: ignore[misc]
    """A message of several parts to the model's answer."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=DEFAULT_NEW_TOKENS)

    def _sanitize_parameters(self, **generate: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, generate, {}

    def preprocess(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        message = {"role": "user", "content": content}
        inputs = self.processor.apply_chat_template(
            [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        ).to(dtype=self.dtype)
        return dict(inputs)

    def _forward(self, model_inputs: dict[str, Any], **generate: Any) -> dict[str, Any]:
        sequences = self.model.generate(**model_inputs, **self._prepare_generate_kwargs(generate))
        num_read = 0 if self.model.config.is_encoder_decoder else model_inputs["input_ids"].shape[1]
        return {"generated_sequence": sequences[:, num_read:].unsqueeze(0)}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"generated_text": self.tokenizer.decode(ids_T, skip_special_tokens=True), "token_ids": ids_T.tolist()}
            for ids_T in model_outputs["generated_sequence"].flatten(0, -2)
        ]


def _read_conversation(pipeline: Any, item: ImageInput | MultimodalInput, parameters: Parameters) -> Any:
    check_drawing(pipeline, parameters)
    parts = (item,) if isinstance(item, ImageInput) else item.parts
    if not 1 <= len(parts) <= _MAX_PARTS:
        raise InvalidField.of("multimodal.parts", f"{len(parts)} parts; 1 to {_MAX_PARTS} are allowed")
    return [_content(pipeline, part, f"multimodal.parts[{index}]", parameters) for index, part in enumerate(parts)]


def _content(pipeline: Any, part: Any, field: str, parameters: Parameters) -> dict[str, Any]:
    """A part as chat templates know it; a kind the model does not read is refused by name."""
    match part:
        case TextInput():
            return {"type": "text", "text": part.text}
        case ImageInput():
            _require(pipeline, "image_processor", f"{field}.image")
            return {"type": "image", "image": decode_image(part.data, f"{field}.image.data")}
        case AudioInput():
            extractor = _require(pipeline, "feature_extractor", f"{field}.audio")
            return {"type": "audio", "audio": decode_sound(part, int(extractor.sampling_rate), f"{field}.audio")}
        case VideoInput():
            _require(pipeline, "video_processor", f"{field}.video")
            frames = int(parameters.get("num_frames") or _FILM_FRAMES)
            return {"type": "video", "video": decode_film(part.data, range(frames), f"{field}.video.data")}
    raise InvalidField.of(field, "is no text, picture, sound or film")


def _require(pipeline: Any, name: str, field: str) -> Any:
    part = getattr(pipeline.processor, name, None)
    if part is None:
        raise UnsupportedField.of(field, f"{pipeline.model.config.model_type} models do not read this kind of part")
    return part


def _read_caption(pipeline: Any, item: ImageInput | MultimodalInput, parameters: Parameters) -> Any:
    check_drawing(pipeline, parameters)
    parts = (item,) if isinstance(item, ImageInput) else item.parts
    images = [part for part in parts if isinstance(part, ImageInput)]
    words = [part.text for part in parts if isinstance(part, TextInput)]
    if len(images) != 1 or len(images) + len(words) != len(parts):
        raise UnsupportedField.of("multimodal.parts", "this model takes one picture, and text beside it")
    return {"image": decode_image(images[0].data, "image.data"), "text": " ".join(words)}


def _writing(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    return given(parameters, *_GENERATION)


def _alone_where_drawn(item: Any, parameters: Parameters) -> Hashable:
    """Draws depend on the whole batch."""
    return Alone() if parameters.get("do_sample") else None


def _shape_texts(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> GeneratedTextResult:
    return GeneratedTextResult(texts=[_text(pipeline, each, parameters) for each in found])


def _text(pipeline: Any, found: dict[str, Any], parameters: Parameters) -> GeneratedText:
    ids, reason = _ended(found["token_ids"], _eos_ids(pipeline))
    return GeneratedText(
        text=found["generated_text"],
        finish_reason=reason,
        token_ids=ids if parameters.get("return_token_ids") else [],
    )


def _ended(token_ids: list[int], eos_ids: set[int]) -> tuple[list[int], Literal["eos_token", "length"]]:
    """The ids up to the one that ended them; the first may be one that only starts."""
    for index, token_id in enumerate(token_ids[1:], start=1):
        if token_id in eos_ids:
            return token_ids[: index + 1], "eos_token"
    return token_ids, "eos_token" if token_ids[:1] and token_ids[0] in eos_ids and len(token_ids) == 1 else "length"


def _eos_ids(pipeline: Any) -> set[int]:
    """BLIP ends with its text model's separator, whatever its generation config says."""
    config = pipeline.model.config
    named: list[Any] = [pipeline.model.generation_config.eos_token_id]
    if config.model_type == "blip":
        named.append(config.text_config.sep_token_id)
    flat = [one for each in named for one in (each if isinstance(each, list) else [each])]
    return {int(each) for each in flat if each is not None and not isinstance(each, torch.Tensor)}


def _num_started(pipeline: Any, inputs: Any) -> int:
    """What stands before the answer; where a decoder of its own writes it, the token that starts it."""
    if pipeline.model.config.is_encoder_decoder or "input_ids" not in inputs:
        return 1
    return int(inputs["input_ids"].shape[1])


CONVERSATION = Steps(
    read=_read_conversation, arguments=_writing, company=alone, shape=_shape_texts, num_started=_num_started
)
CAPTION = Steps(
    read=_read_caption, arguments=_writing, company=_alone_where_drawn, shape=_shape_texts, num_started=_num_started
)
