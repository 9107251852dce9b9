"""What visual-question-answering and image-to-image add to their pipelines."""

from __future__ import annotations

from typing import Any

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.items import (
    Answer,
    ImageInput,
    ImageResult,
    QuestionAnsweringResult,
    VisualQuestionInput,
)
from slipstream_server.tasks.media.images import decode_image, encode_image
from slipstream_server.tasks.media.pipelines import Parameters, Steps, given

MAX_IMAGE_TO_IMAGE_PIXELS = 2_000_000
"""Such models keep every pixel's features in every layer."""


def _read_question(pipeline: Any, item: VisualQuestionInput, parameters: Parameters) -> Any:
    if not item.question.strip():
        raise InvalidField.of("visual_question.question", "is empty")
    for name in ("max_new_tokens", "num_beams"):
        if parameters.get(name) is not None and not pipeline.model.can_generate():
            raise InvalidField.of(f"parameters.{name}", "this model chooses from a list and writes nothing")
    return {"image": decode_image(item.image, "visual_question.image.data"), "question": item.question}


def _visual_arguments(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    generation = given(parameters, "max_new_tokens", "num_beams") if pipeline.model.can_generate() else {}
    return {**given(parameters, "top_k"), **generation}


def _shape_answers(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> QuestionAnsweringResult:
    return QuestionAnsweringResult(answers=[Answer(text=a["answer"], score=float(a["score"])) for a in found])


def _num_started(pipeline: Any, inputs: Any) -> int:
    """The question is read by the encoder; the answer begins with a token of its own."""
    return 1


VISUAL_QUESTIONS = Steps(
    read=_read_question, arguments=_visual_arguments, shape=_shape_answers, num_started=_num_started
)


# image-to-image


def _read_image(pipeline: Any, item: ImageInput, parameters: Parameters) -> Any:
    return decode_image(item.data, "image.data", max_pixels=MAX_IMAGE_TO_IMAGE_PIXELS)


def _shape_image(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> ImageResult:
    return ImageResult(image=encode_image(found))


IMAGE_TO_IMAGE = Steps(read=_read_image, shape=_shape_image)
