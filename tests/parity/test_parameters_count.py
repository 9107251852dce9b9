"""Every parameter that DescribeTask lists changes what comes out, on some model and from some start; one that did not
would be a lie. That what comes out is right is shown elsewhere, beside the library's own pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.parity.encoder_models import write_model

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.engine.task_assembly import runner_for
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.models.loading import load_model
from slipstream_server.tasks import items
from slipstream_server.tasks.media.runners import media_runner
from slipstream_server.tasks.parameters import check_parameters
from slipstream_server.tasks.registry import TASKS
from unit.tasks.media import tiny_media as tiny
from unit.tasks.media.side_by_side import batched

WITHOUT_EFFECT = {
    # Says so of itself: it is about how much memory is used.
    ("mask-generation", "points_per_batch"),
    # Films are read by processors that need torchvision.
    ("any-to-any", "num_frames"),
}
_MASKS = {"points_per_crop": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "mask_threshold": 4.0}
LONG = "the old captain lived near the harbour and he saw the storm " * 12
CAPTION = "the old captain lived near the house, and he sailed by london."


@dataclass(frozen=True, kw_only=True)
class Case:
    """``model``: who makes one of media, or the name of an encoder. Each of ``changes`` is made to ``base`` alone."""

    task: str
    model: tiny.Maker | str
    given: Any
    base: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.task}-{self.model if isinstance(self.model, str) else self.model.__name__}-{len(self.base)}"


def _picture() -> items.ImageInput:
    return items.ImageInput(data=tiny.png(1))


def _sound(seconds: float = 0.5) -> items.AudioInput:
    return items.AudioInput(data=tiny.wav(tiny.tone(1, seconds)))


def _page() -> items.DocumentQuestionInput:
    names = ["total", "invoice", "number", "42", "on", "this", "page", "what", "color", "red", "blue", "7"]
    words = tuple(
        items.PageWord(text=name, box=items.Box(10.0 * place, 20, 10.0 * place + 8, 30))
        for place, name in enumerate(names * 2)
    )
    return items.DocumentQuestionInput(question="what is the total", words=words)


def _message() -> items.MultimodalInput:
    return items.MultimodalInput(parts=(_picture(), items.TextInput("what color is this cat")))


def _writing(task: str, given: Any) -> list[Case]:
    greedy = {"max_new_tokens": 6}
    return [
        Case(
            task=task, model=tiny.llava, given=given, base=greedy,
            changes={"max_new_tokens": 3, "return_token_ids": True, "num_beams": 4, "do_sample": True},
        ),
        Case(
            task=task, model=tiny.llava, given=given, base={**greedy, "num_beams": 2},
            changes={"num_return_sequences": 2},
        ),
        Case(
            task=task, model=tiny.llava, given=given, base={**greedy, "do_sample": True, "seed": 1},
            changes={"seed": 2, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
        ),
    ]  # fmt: skip


CASES = [
    *_writing("any-to-any", _message()),
    *_writing("image-text-to-text", _message()),
    Case(
        task="audio-classification", model=tiny.wav2vec2_labels, given=_sound(),
        changes={"function_to_apply": "sigmoid", "top_k": 1},
    ),
    Case(
        task="automatic-speech-recognition", model=tiny.wav2vec2_ctc, given=_sound(2.5),
        changes={"return_timestamps": "word", "chunk_length_s": 1.0},
    ),
    Case(
        task="automatic-speech-recognition", model=tiny.wav2vec2_ctc, given=_sound(2.5), base={"chunk_length_s": 1.0},
        changes={"stride_length_s": 0.4},
    ),
    Case(
        task="automatic-speech-recognition", model=tiny.whisper, given=_sound(), base={"max_new_tokens": 8},
        changes={
            "max_new_tokens": 3, "num_beams": 4, "language": "de", "task": "translate", "return_language": True,
        },
    ),
    Case(task="depth-estimation", model=tiny.dpt, given=_picture(), changes={"return_tensor": False}),
    Case(
        task="document-question-answering", model=tiny.layoutlm, given=_page(), base={"top_k": 3},
        changes={
            "top_k": 2, "max_seq_len": 18, "max_answer_len": 1,
        },
    ),
    Case(
        task="document-question-answering", model=tiny.layoutlm, given=_page(), base={"top_k": 500},
        changes={"handle_impossible_answer": True},
    ),
    Case(
        task="document-question-answering", model=tiny.layoutlm, given=_page(), base={"top_k": 3, "max_seq_len": 18},
        changes={"doc_stride": 1},
    ),
    Case(
        task="feature-extraction", model="bert-plain", given=items.TextInput(CAPTION),
        changes={"normalize": True, "pooling": "mean"},
    ),
    Case(task="feature-extraction", model="bert-plain", given=items.TextInput(LONG), changes={"truncation": True}),
    Case(
        task="fill-mask", model="bert-mask", given=items.TextInput("the [MASK] saw a storm."),
        changes={"targets": ["ship", "sea"], "top_k": 2},
    ),
    Case(
        task="fill-mask", model="bert-mask", given=items.TextInput("the [MASK] saw " + LONG),
        changes={"truncation": True},
    ),
    Case(
        task="image-classification", model=tiny.vit, given=_picture(),
        changes={"function_to_apply": "none", "top_k": 2},
    ),
    Case(task="image-feature-extraction", model=tiny.vit_features, given=_picture(), changes={"pool": True}),
    Case(
        task="image-segmentation", model=tiny.maskformer, given=_picture(),
        base={"threshold": 0.0, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.0},
        changes={
            "subtask": "semantic", "threshold": 0.99, "mask_threshold": 0.45, "overlap_mask_area_threshold": 0.9,
        },
    ),
    Case(
        task="keypoint-matching", model=tiny.lightglue,
        given=items.ImagePairInput(first=tiny.png(1, 80, 64), second=tiny.png(2, 80, 64)), changes={"threshold": 0.99},
    ),
    Case(
        task="mask-generation", model=tiny.sam, given=_picture(), base=_MASKS,
        changes={
            "points_per_crop": 3, "crops_n_layers": 1, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.5,
            "mask_threshold": 5.0, "crops_nms_thresh": 0.3,
        },
    ),
    Case(
        task="mask-generation", model=tiny.sam, given=_picture(), base={**_MASKS, "crops_n_layers": 1},
        changes={"crop_overlap_ratio": 0.8},
    ),
    Case(
        task="mask-generation", model=tiny.sam, given=_picture(),
        base={**_MASKS, "stability_score_thresh": 0.5, "stability_score_offset": 0.1},
        changes={"stability_score_offset": 9.0},
    ),
    Case(task="object-detection", model=tiny.yolos, given=_picture(), changes={"threshold": 0.1}),
    Case(
        task="question-answering", model="bert-qa",
        given=items.QuestionAnsweringInput("who lived near the harbour?", CAPTION), base={"top_k": 4},
        changes={
            "top_k": 2, "align_to_words": False, "max_answer_len": 1, "max_question_len": 2, "max_seq_len": 16,
        },
    ),
    Case(
        task="question-answering", model="bert-qa", given=items.QuestionAnsweringInput("who?", "the old captain"),
        base={"top_k": 500}, changes={"handle_impossible_answer": True},
    ),
    Case(
        task="question-answering", model="bert-qa", given=items.QuestionAnsweringInput("who lived?", LONG),
        base={"top_k": 4, "max_seq_len": 20}, changes={"doc_stride": 2},
    ),
    Case(
        task="sentence-similarity", model="bert-plain", given=items.SimilarityInput("the old captain", ("a storm",)),
        changes={"pooling": "max"},
    ),
    Case(
        task="sentence-similarity", model="bert-plain", given=items.SimilarityInput("the old captain", (LONG,)),
        changes={"truncation": True},
    ),
    Case(
        task="table-question-answering", model=tiny.bart,
        given=items.TableQuestionInput("what is the total", ("page", "number"), (("on", "42"), ("this", "7"))),
        changes={"max_new_tokens": 2},
    ),
    Case(
        task="table-question-answering", model=tiny.bart,
        given=items.TableQuestionInput("what is the total", ("page", "number"), (("on", "42"), ("this", "7")) * 12),
        base={"max_new_tokens": 4}, changes={"truncation": True},
    ),
    Case(
        task="text-classification", model="bert-classes", given=items.TextInput(CAPTION),
        changes={"function_to_apply": "none", "top_k": 2},
    ),
    Case(task="text-classification", model="bert-classes", given=items.TextInput(LONG), changes={"truncation": True}),
    Case(
        task="text-ranking", model="bert-regression", given=items.RankingInput("a ship", ("the sea", "the storm")),
        changes={"function_to_apply": "none", "return_documents": True, "top_k": 1},
    ),
    Case(
        task="text-ranking", model="bert-regression", given=items.RankingInput("a ship", ("the sea", LONG)),
        changes={"truncation": True},
    ),
    Case(task="text-to-audio", model=tiny.vits, given=items.TextInput("hello there"), changes={"seed": 3}),
    Case(
        task="text-to-audio", model=tiny.musicgen, given=items.TextInput("a dog bark"), base={"max_new_tokens": 8},
        changes={"max_new_tokens": 5, "do_sample": True},
    ),
    Case(
        task="text-to-audio", model=tiny.musicgen, given=items.TextInput("a dog bark"),
        base={"max_new_tokens": 8, "do_sample": True, "seed": 1},
        changes={"seed": 2, "temperature": 0.01, "top_k": 1, "top_p": 0.001},
    ),
    Case(
        task="token-classification", model="bert-ner", given=items.TextInput(CAPTION),
        changes={"aggregation_strategy": "simple", "ignore_labels": ["B-PER"]},
    ),
    Case(
        task="token-classification", model="bert-ner", given=items.TextInput(LONG),
        base={"aggregation_strategy": "simple"}, changes={"truncation": True, "stride": 4},
    ),
    Case(
        task="video-classification", model=tiny.videomae, given=items.VideoInput(data=tiny.film()),
        changes={"function_to_apply": "sigmoid", "top_k": 1, "frame_sampling_rate": 3, "num_frames": 2},
    ),
    Case(
        task="visual-question-answering", model=tiny.vilt,
        given=items.VisualQuestionInput(image=tiny.png(1), question="what is this"), changes={"top_k": 1},
    ),
    Case(
        task="visual-question-answering", model=tiny.blip_questions,
        given=items.VisualQuestionInput(image=tiny.png(1), question="what is this"), base={"max_new_tokens": 8},
        changes={"max_new_tokens": 3, "num_beams": 4},
    ),
    Case(
        task="zero-shot-classification", model="bert-nli", given=items.ZeroShotInput(CAPTION, ("sports", "the sea")),
        changes={"multi_label": True},
    ),
    Case(
        task="zero-shot-classification", model="bert-nli", given=items.ZeroShotInput(LONG, ("sports", "the sea")),
        changes={"truncation": False},
    ),
    Case(
        task="zero-shot-object-detection", model=tiny.owlvit,
        given=items.ZeroShotImageInput(image=tiny.png(1), candidate_labels=("cat", "dog")), base={"threshold": 0.001},
        changes={"threshold": 0.6, "top_k": 1},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Any]:
    kept: dict[tuple[str, Any], Any] = {}
    made: dict[Any, tuple[Any, Path]] = {}

    def make(case: Case) -> Any:
        folder = tmp_path_factory.mktemp("model")
        if isinstance(case.model, str):
            write_model(case.model, folder)
        else:
            if case.model not in made:
                made[case.model] = (case.model(folder), folder)
            model, folder = made[case.model]
            if case.task != "table-question-answering":
                return media_runner(case.task, model, folder, torch.device("cpu"))
            model.save_pretrained(folder)
        return runner_for(case.task, load_model(folder, LoadOptions(device="cpu", task=case.task)), folder)

    def get(case: Case) -> Any:
        key = (case.task, case.model)
        if key not in kept:
            kept[key] = make(case)
        return kept[key]

    return get


def outcome(runner: Any, case: Case, parameters: Mapping[str, Any]) -> Any:
    """The result as plain data, free of rounding, or the reason why there is none."""
    with torch.inference_mode():
        try:
            [result], _ = batched(runner, [case.given], check_parameters(TASKS[case.task], parameters))
        except SlipstreamError as error:
            return error.reason
    return plain(msgspec.to_builtins(result))


def plain(value: Any) -> Any:
    match value:
        case float():
            return round(value, 4)
        case dict():
            return {name: plain(each) for name, each in value.items()}
        case list():
            return [plain(each) for each in value]
    return value


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_change_results(case: Case, runner_of: Callable[[Case], Any]) -> None:
    runner = runner_of(case)
    before = outcome(runner, case, case.base)
    if not {"do_sample", "seed"} & set(case.changes):
        assert outcome(runner, case, case.base) == before
    unchanged = [
        name for name, value in case.changes.items() if outcome(runner, case, {**case.base, name: value}) == before
    ]
    assert not unchanged


def test_no_parameter_is_left_out() -> None:
    described = {
        (spec.id, parameter.name)
        for spec in TASKS.values()
        for parameter in spec.parameters
        if spec.runs_by == "worker"
    }
    shown = {(case.task, name) for case in CASES for name in case.changes}
    assert described - shown == WITHOUT_EFFECT
    assert shown <= described
