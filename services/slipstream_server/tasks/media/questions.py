"""What the tasks that answer questions about pictures and pages add to their pipelines."""

from __future__ import annotations

from typing import Any

from slipstream_server.errors import InvalidField, MissingDependency
from slipstream_server.tasks.items import (
    Answer,
    DocumentQuestionInput,
    ImageInput,
    ImageResult,
    QuestionAnsweringResult,
    VisualQuestionInput,
    WordSpan,
)
from slipstream_server.tasks.media.images import decode_image, encode_image
from slipstream_server.tasks.media.pipelines import Alone, Parameters, Steps, given

MAX_IMAGE_TO_IMAGE_PIXELS = 2_000_000
"""Such models keep every pixel's features in every layer."""


def _read_question(pipeline: Any, item: VisualQuestionInput, parameters: Parameters) -> Any:
    if not item.question.strip():
        raise InvalidField.of("visual_question.question", "is empty")
    return {"image": decode_image(item.image, "visual_question.image.data"), "question": item.question}


def _visual_arguments(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    generation = given(parameters, "max_new_tokens", "num_beams") if pipeline.model.can_generate() else {}
    return {**given(parameters, "top_k"), **generation}


def _shape_answers(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> QuestionAnsweringResult:
    return QuestionAnsweringResult(answers=[Answer(text=a["answer"], score=float(a["score"])) for a in found])


VISUAL_QUESTIONS = Steps(read=_read_question, arguments=_visual_arguments, shape=_shape_answers)


# document-question-answering


def _read_page(pipeline: Any, item: DocumentQuestionInput, parameters: Parameters) -> Any:
    if not item.question.strip():
        raise InvalidField.of("document_question.question", "is empty")
    page: dict[str, Any] = {"question": item.question}
    if item.image is not None:
        page["image"] = decode_image(item.image, "document_question.image.data")
    if _reads_pixels_only(pipeline):
        if item.image is None:
            raise InvalidField.of("document_question.image", "is missing; this model reads the picture")
        return page
    if not item.words:
        raise MissingDependency(
            "document_question.words: is empty, and this service has no OCR engine to read the page"
        )
    if item.image is None and _needs_pixels(pipeline):
        raise InvalidField.of("document_question.image", "is missing; this model reads the picture beside the words")
    _check_window(pipeline, item.question, parameters)
    page["word_boxes"] = [(word.text, _box(word.box, index)) for index, word in enumerate(item.words)]
    return page


def _reads_pixels_only(pipeline: Any) -> bool:
    """Donut, which needs no words."""
    return bool(pipeline.model.config.model_type == "vision-encoder-decoder")


def _needs_pixels(pipeline: Any) -> bool:
    return bool(pipeline.model.config.model_type != "layoutlm")


def _box(box: Any, index: int) -> list[int]:
    edges = [int(box.x_min), int(box.y_min), int(box.x_max), int(box.y_max)]
    if not (0 <= edges[0] <= edges[2] <= 1000 and 0 <= edges[1] <= edges[3] <= 1000):
        raise InvalidField.of(
            f"document_question.words[{index}].box", f"{edges} is no rectangle within 0 to 1000 of the page"
        )
    return edges


def _check_window(pipeline: Any, question: str, parameters: Parameters) -> None:
    """Where windows would not advance the tokenizer brings the process down rather than raise."""
    tokenizer = pipeline.tokenizer
    window = min(int(parameters.get("max_seq_len") or tokenizer.model_max_length), int(tokenizer.model_max_length))
    stride = int(parameters.get("doc_stride") or min(window // 2, 256))
    taken = len(
        tokenizer.backend_tokenizer.encode(question.split(), is_pretokenized=True, add_special_tokens=False).ids
    )
    room = window - taken - tokenizer.num_special_tokens_to_add(pair=True)
    if stride >= room:
        raise InvalidField.of(
            "document_question.question",
            f"a question of {taken} tokens leaves {room} of a window's {window}, and doc_stride is {stride}",
        )


def _page_arguments(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    names = ("top_k", "doc_stride", "max_seq_len", "max_answer_len", "handle_impossible_answer")
    return given(parameters, *names)


def _shape_page_answers(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> QuestionAnsweringResult:
    return QuestionAnsweringResult(
        answers=[
            Answer(
                text=each["answer"] or "",
                score=float(each.get("score", 0.0)),
                word_span=WordSpan(int(each["start"]), int(each["end"])) if "start" in each else None,
            )
            for each in found
        ]
    )


def _alone(item: Any, parameters: Parameters) -> Alone:
    return Alone()


DOCUMENT_QUESTIONS = Steps(read=_read_page, arguments=_page_arguments, company=_alone, shape=_shape_page_answers)


# image-to-image


def _read_image(pipeline: Any, item: ImageInput, parameters: Parameters) -> Any:
    return decode_image(item.data, "image.data", max_pixels=MAX_IMAGE_TO_IMAGE_PIXELS)


def _shape_image(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> ImageResult:
    return ImageResult(image=encode_image(found))


IMAGE_TO_IMAGE = Steps(read=_read_image, shape=_shape_image)
