"""document-question-answering: a question about a page to a stretch of the words on it, or to a written answer (Donut).

Transformers 5.23's own pipeline hands LayoutLMv3 the picture under a name that model does not know, so that it answers
without having seen the page. Here it sees it, as when it was trained. Torch-side code of the worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import DocumentQuestionAnsweringPipeline

from slipstream_server.errors import InvalidField, MissingDependency, PromptTooLong
from slipstream_server.tasks.items import Answer, DocumentQuestionInput, QuestionAnsweringResult, WordSpan
from slipstream_server.tasks.media.images import decode_image
from slipstream_server.tasks.media.pipelines import Parameters, Steps, alone, given

_WORDS_ONLY, _WORDS_AND_PICTURE, _PICTURE_ONLY = "layoutlm", "layoutlmv3", "vision-encoder-decoder"
READERS = (_WORDS_ONLY, _WORDS_AND_PICTURE, _PICTURE_ONLY)
"""The types of models that read pages here. LayoutLMv2 needs detectron2, which has no release that installs."""
_MAX_SHARED_TOKENS = 256


class PageQuestionPipeline(DocumentQuestionAnsweringPipeline):  # type: ignore[misc]
    """As Transformers' own, with the picture where LayoutLMv3 looks for it, and answers from the words alone."""

    _load_image_processor = True
    _load_feature_extractor = False

    def preprocess(self, input: dict[str, Any], **how: Any) -> Iterator[dict[str, Any]]:  # noqa: A002
        for window in super().preprocess(input, **how):
            if self.model.config.model_type == _WORDS_AND_PICTURE:
                window["pixel_values"] = window.pop("image")
                del window["token_type_ids"]  # its processor makes none
            yield window

    def _forward(self, model_inputs: dict[str, Any], **generate: Any) -> dict[str, Any]:
        if self.model.config.model_type == _PICTURE_ONLY:
            # Asked for and never looked at; most ways to attend cannot give them.
            del model_inputs["output_attentions"]
        found: dict[str, Any] = super()._forward(model_inputs, **generate)
        if self.model.config.model_type == _WORDS_AND_PICTURE:
            # The places behind the words are patches of the picture.
            num_tokens = model_inputs["input_ids"].shape[1]
            found |= {name: found[name][:, :num_tokens] for name in ("start_logits", "end_logits")}
        return found


def processors_left_out(model_type: str) -> tuple[str, ...]:
    """What a pipeline for such a model must not load: a processor of pictures may want to start an OCR program."""
    return ("image_processor",) if model_type == _WORDS_ONLY else ()


def _read_page(pipeline: Any, item: DocumentQuestionInput, parameters: Parameters) -> Any:
    if not item.question.strip():
        raise InvalidField.of("document_question.question", "is empty")
    page: dict[str, Any] = {"question": item.question}
    kind = pipeline.model.config.model_type
    if item.image is not None:
        page["image"] = decode_image(item.image, "document_question.image.data")
    elif kind != _WORDS_ONLY:
        raise InvalidField.of("document_question.image", "is missing; this model looks at the picture of the page")
    if kind == _PICTURE_ONLY:
        _check_written(parameters)
        return page
    if not item.words:
        raise MissingDependency(
            "document_question.words: is empty, and this service has no OCR engine to read the page: send the words "
            "on it with their boxes, or ask a model that reads pictures (Donut)"
        )
    _check_window(pipeline, item.question, parameters)
    page["word_boxes"] = [(word.text, _box(word.box, index)) for index, word in enumerate(item.words)]
    return page


def _box(box: Any, index: int) -> list[int]:
    edges = [int(box.x_min), int(box.y_min), int(box.x_max), int(box.y_max)]
    if not (0 <= edges[0] <= edges[2] <= 1000 and 0 <= edges[1] <= edges[3] <= 1000):
        raise InvalidField.of(
            f"document_question.words[{index}].box", f"{edges} is no rectangle within 0 to 1000 of the page"
        )
    return edges


def _check_written(parameters: Parameters) -> None:
    """What is about words on the page has no meaning for a model that writes its answer."""
    for name in ("doc_stride", "max_seq_len", "handle_impossible_answer"):
        if parameters.get(name):
            raise InvalidField.of(f"parameters.{name}", "this model looks at the picture and points at no words")


def _window_tokens(pipeline: Any, parameters: Parameters) -> int:
    """Tokens of question, words and special tokens together. Raises InvalidField for more than the model reads."""
    config = pipeline.model.config
    positions = int(config.max_position_embeddings)
    if config.model_type == _WORDS_AND_PICTURE:  # counts from behind the padding's id on, as RoBERTa does
        positions -= int(config.pad_token_id or 0) + 1
    most = min(positions, int(pipeline.tokenizer.model_max_length))
    asked = int(parameters.get("max_seq_len") or most)
    if asked > most:
        raise InvalidField.of("parameters.max_seq_len", f"{asked}; this model reads {most} tokens at once")
    return asked


def _shared_tokens(window: int, parameters: Parameters) -> int:
    return int(parameters.get("doc_stride") or min(window // 2, _MAX_SHARED_TOKENS))


def _check_window(pipeline: Any, question: str, parameters: Parameters) -> None:
    """Where windows would not advance the tokenizer brings the process down rather than raise."""
    tokenizer = pipeline.tokenizer
    window = _window_tokens(pipeline, parameters)
    shared = _shared_tokens(window, parameters)
    taken = len(
        tokenizer.backend_tokenizer.encode(question.split(), is_pretokenized=True, add_special_tokens=False).ids
    )
    room = window - taken - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise PromptTooLong.of(
            "document_question.question", f"{taken} tokens leave no room for the page in a window of {window}"
        )
    if shared >= room:
        raise InvalidField.of(
            "parameters.doc_stride" if parameters.get("doc_stride") else "document_question.question",
            f"a question of {taken} tokens leaves {room} of a window's {window}, and doc_stride is {shared}",
        )


def _page_arguments(pipeline: Any, item: Any, parameters: Parameters) -> dict[str, Any]:
    if pipeline.model.config.model_type == _PICTURE_ONLY:
        return given(parameters, "top_k")
    window = _window_tokens(pipeline, parameters)
    return {
        **given(parameters, "top_k", "max_answer_len", "handle_impossible_answer"),
        "max_seq_len": window,
        "doc_stride": _shared_tokens(window, parameters),
    }


def _shape_page_answers(pipeline: Any, item: Any, parameters: Parameters, found: Any) -> QuestionAnsweringResult:
    return QuestionAnsweringResult(answers=[_answer(each) for each in found])


def _answer(found: dict[str, Any]) -> Answer:
    """An empty answer, which says that there is none, stands nowhere on the page."""
    is_on_page = found["answer"] and "start" in found
    return Answer(
        text=found["answer"] or "",
        score=float(found.get("score", 0.0)),
        word_span=WordSpan(int(found["start"]), int(found["end"])) if is_on_page else None,
    )


def _num_started(pipeline: Any, inputs: Any) -> int:
    """The question stands in front of what Donut writes."""
    return int(inputs["decoder_input_ids"].shape[1]) if "decoder_input_ids" in inputs else 0


DOCUMENT_QUESTIONS = Steps(
    read=_read_page,
    arguments=_page_arguments,
    company=alone,
    shape=_shape_page_answers,
    num_started=_num_started,
)
