"""Inputs: what is whole and what is not, by the contract's bounds."""

from __future__ import annotations

import time

import pytest

from slipstream_server.errors import InvalidField, InvalidRequest
from slipstream_server.tasks.inputs import MAX_CELLS, MAX_TEXT_BYTES, check_input, check_kinds, size_bytes
from slipstream_server.tasks.items import (
    AudioInput,
    Box,
    DecisionInput,
    DecisionOption,
    DecisionQuestion,
    DocumentQuestionInput,
    ImageInput,
    ImagePairInput,
    MultimodalInput,
    PageWord,
    QuestionAnsweringInput,
    RankingInput,
    SimilarityInput,
    TableQuestionInput,
    TaskInput,
    TextInput,
    TextPairInput,
    VideoInput,
    VisualQuestionInput,
    WordsInput,
    ZeroShotAudioInput,
    ZeroShotImageInput,
    ZeroShotInput,
)
from slipstream_server.tasks.registry import TASKS

SPEC = TASKS["text-classification"]
SOUND = AudioInput(b"RIFF")
YES_NO = DecisionQuestion("late", "Is it late?", "noul")

WHOLE: list[TaskInput] = [
    TextInput(""),
    TextInput("x" * MAX_TEXT_BYTES),
    TextPairInput("a", "b"),
    WordsInput(("a", "b")),
    QuestionAnsweringInput("who?", " "),
    QuestionAnsweringInput("who?", "x" * MAX_TEXT_BYTES),
    TableQuestionInput("how many?", ("a", "b"), (("1", "2"),)),
    ZeroShotInput("a", ("x", "y"), "It is {}."),
    RankingInput("a", ("", "b")),
    SimilarityInput("a", ("b",)),
    ImageInput(b"x"),
    ImagePairInput(b"x", b"y"),
    ZeroShotImageInput(b"x", ("a",)),
    VisualQuestionInput(b"x", "what?"),
    DocumentQuestionInput("what?", None, (PageWord("a", Box(0, 0, 1000, 1000)),)),
    SOUND,
    AudioInput(b"1234", "pcm_f32le", 16_000),
    ZeroShotAudioInput(SOUND, ("a",)),
    VideoInput(b"x"),
    MultimodalInput((TextInput("a"), ImageInput(b"x"), SOUND, VideoInput(b"x"))),
    DecisionInput({"a": [1, "b", None]}, (YES_NO,), {"<p>": b"x"}),
]
BROKEN: list[tuple[TaskInput, str]] = [
    (TextInput("a\0"), "text"),
    (TextInput("\ud800"), "text"),
    (TextInput("é" * (MAX_TEXT_BYTES // 2 + 1)), "text"),
    (TextPairInput("a", "\0"), "text_pair.text_pair"),
    (WordsInput(()), "words.words"),
    (WordsInput(("a",), "\0"), "words.delimiter"),
    (QuestionAnsweringInput("", "a"), "question_answering.question"),
    (QuestionAnsweringInput("a", ""), "question_answering.context"),
    (TableQuestionInput("a", (), (("1",),)), "table_question.table.columns"),
    (TableQuestionInput("a", ("x", "x"), (("1", "2"),)), "table_question.table.columns"),
    (TableQuestionInput("a", ("x",), ()), "table_question.table.rows"),
    (TableQuestionInput("a", ("x",), (("1", "2"),)), "table_question.table.rows[0].cells"),
    (ZeroShotInput("a", ()), "zero_shot.candidate_labels"),
    (ZeroShotInput("a", ("x", "x")), "zero_shot.candidate_labels"),
    (ZeroShotInput("a", ("",)), "zero_shot.candidate_labels[0]"),
    (ZeroShotInput("a", tuple(map(str, range(10_000)))), "zero_shot.candidate_labels"),
    (ZeroShotInput("a", ("x",), "no place"), "zero_shot.hypothesis_template"),
    (RankingInput("a", ()), "ranking.documents"),
    (RankingInput("a", ("x" * MAX_TEXT_BYTES, "y")), "ranking.documents"),
    (SimilarityInput("", ("b",)), "similarity.source_sentence"),
    (ImageInput(b""), "image.data"),
    (ImageInput(bytes(15 * 1024 * 1024 + 1)), "image.data"),
    (ImagePairInput(b"x", b""), "image_pair.second.data"),
    (VisualQuestionInput(b"x", ""), "visual_question.question"),
    (DocumentQuestionInput("what?"), "document_question"),
    (DocumentQuestionInput("a", None, (PageWord("a", Box(2, 0, 1, 1)),)), "document_question.words[0].box"),
    (AudioInput(b"x", "pcm_s16le", 16_000), "audio.data"),
    (AudioInput(b"12", "pcm_s16le", 0), "audio.sampling_rate_hz"),
    (AudioInput(b"12", "container", 16_000), "audio.sampling_rate_hz"),
    (ZeroShotAudioInput(AudioInput(b""), ("a",)), "zero_shot_audio.audio.data"),
    (MultimodalInput(()), "multimodal.parts"),
    (MultimodalInput((TextInput("a"), ImageInput(b""))), "multimodal.parts[1].image.data"),
    (DecisionInput("a", ()), "decision.questions"),
    (DecisionInput("a", (YES_NO, YES_NO)), "decision.questions[1].name"),
    (
        DecisionInput("a", (DecisionQuestion("n", "", "choice", (DecisionOption("x"),)),)),
        "decision.questions[0].options",
    ),
    (DecisionInput({"a": ["\0"]}, (YES_NO,)), "decision.state.a[0]"),
]


@pytest.mark.parametrize("item", WHOLE, ids=lambda item: item.KIND)
def test_what_is_whole_is_taken(item: TaskInput) -> None:
    check_input(SPEC, item)
    assert size_bytes(item) > 0


@pytest.mark.parametrize(("item", "field"), BROKEN, ids=[field for _, field in BROKEN])
def test_what_is_broken_is_refused_by_field(item: TaskInput, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_input(SPEC, item)
    assert caught.value.violations[0].field == field


def test_kinds_and_numbers_of_inputs() -> None:
    check_kinds(SPEC, [TextInput("a"), TextPairInput("a", "b")])
    for wrong, field in (([], "inputs"), ([TextInput("a")] * 1025, "inputs"), ([TextInput("a"), SOUND], "inputs[1]")):
        with pytest.raises(InvalidField) as caught:
            check_kinds(SPEC, wrong)
        assert caught.value.violations[0].field == field


def test_a_template_means_nothing_to_object_detection() -> None:
    with pytest.raises(InvalidRequest, match="hypothesis_template"):
        check_input(TASKS["zero-shot-object-detection"], ZeroShotImageInput(b"x", ("a",), "a {}"))


def test_many_columns_with_one_of_them_twice_are_judged_at_once() -> None:
    """The event loop judges: two passes over 65,536 names, not one over all pairs."""
    columns = (*(str(place) for place in range(MAX_CELLS - 1)), "7")
    started_s = time.process_time()
    with pytest.raises(InvalidField, match="'7' twice"):
        check_input(SPEC, TableQuestionInput("a", columns, (columns,)))
    assert time.process_time() - started_s < 1.0
