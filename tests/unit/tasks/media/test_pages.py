"""Questions about pages. LayoutLM beside Transformers' pipeline, which serves it rightly; LayoutLMv3 and Donut beside
their own processors and models, called by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from slipstream_server.errors import InvalidField, MissingDependency, ModelLoadFailed, PromptTooLong, UnsupportedField
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.models.loading import load_model
from slipstream_server.tasks import items
from slipstream_server.tasks.media.runners import media_runner
from unit.tasks.media import tiny_media as tiny
from unit.tasks.media.side_by_side import batched, plain

TASK = "document-question-answering"
CPU = torch.device("cpu")
NAMES = ["total", "invoice", "number", "42", "on", "this", "page", "what", "color", "red", "blue", "7"]
QUESTIONS = ("what is the total", "what color is this")


def words() -> tuple[items.PageWord, ...]:
    return tuple(
        items.PageWord(text=name, box=items.Box(10.0 * i, 20.0, 10.0 * i + 8, 30.0)) for i, name in enumerate(NAMES)
    )


def boxes() -> list[list[int]]:
    return [[10 * place, 20, 10 * place + 8, 30] for place in range(len(NAMES))]


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 3},
        {"top_k": 4, "max_seq_len": 16, "doc_stride": 2},
        {"top_k": 2, "max_answer_len": 2},
        {"top_k": 9, "handle_impossible_answer": True},
    ],
)
def test_by_words_and_boxes(made: Any, parameters: dict[str, Any]) -> None:
    model, folder = made(tiny.layoutlm)
    runner = media_runner(TASK, model, folder, CPU)
    asked = [items.DocumentQuestionInput(question=each, words=words()) for each in QUESTIONS]
    results, _ = batched(runner, asked, parameters)
    pipe = plain(TASK, model, folder, "tokenizer")
    for question, result in zip(QUESTIONS, results, strict=True):
        page = {"question": question, "word_boxes": list(zip(NAMES, boxes(), strict=True)), "image": None}
        expected = pipe(page, **parameters)
        assert [each.text for each in result.answers] == [each["answer"] for each in expected]
        assert [each.score for each in result.answers] == pytest.approx([e["score"] for e in expected], abs=1e-4)
        assert [places(each) for each in result.answers] == [
            (each["start"], each["end"]) if each["answer"] else None for each in expected
        ]


def places(answer: items.Answer) -> tuple[int, int] | None:
    return None if answer.word_span is None else (answer.word_span.start_word, answer.word_span.end_word)


def best_stretch(model: Any, folder: Path, question: str, image: Any, most_tokens: int, **how: Any) -> Any:
    """Score, first and last word of the best answer: its processor's tensors, the model, and every pair weighed."""
    processor = hf.LayoutLMv3Processor(
        hf.AutoImageProcessor.from_pretrained(folder, apply_ocr=False), hf.AutoTokenizer.from_pretrained(folder)
    )
    windows = processor(
        image, question, NAMES, boxes=boxes(), return_overflowing_tokens=True, truncation="only_second", **how
    )
    found = []
    for place, ids in enumerate(windows["input_ids"]):
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([ids]),
                bbox=torch.tensor([windows["bbox"][place]]),
                attention_mask=torch.tensor([windows["attention_mask"][place]]),
                pixel_values=torch.as_tensor(windows["pixel_values"][place])[None],
            )
        page = [token for token, part in enumerate(windows.sequence_ids(place)) if part == 1]
        # The first token, which stands for "no answer", has its share of the probability.
        starts, ends = (logits[0, [0, *page]].softmax(0)[1:] for logits in (output.start_logits, output.end_logits))
        found += [
            (float(starts[i] * ends[j]), windows.word_ids(place)[page[i]], windows.word_ids(place)[page[j]])
            for i in range(len(page))
            for j in range(i, min(i + most_tokens, len(page)))
        ]
    return max(found)


@pytest.mark.parametrize(
    ("parameters", "how"),
    [
        ({}, {"max_length": 64}),
        ({"max_answer_len": 3}, {"max_length": 64}),
        ({"max_seq_len": 40, "doc_stride": 4}, {"max_length": 40, "stride": 4}),
    ],
)
def test_by_words_boxes_and_the_picture(made: Any, parameters: dict[str, Any], how: dict[str, Any]) -> None:
    model, folder = made(tiny.layoutlmv3)
    assert json.loads((folder / "preprocessor_config.json").read_text())["apply_ocr"]
    runner = media_runner(TASK, model, folder, CPU)
    for question in ("what total", "red page"):
        for seed in (1, 2):
            page = items.DocumentQuestionInput(question=question, image=tiny.png(seed), words=words())
            [result], _ = batched(runner, [page], parameters)
            most_tokens = parameters.get("max_answer_len", 15)
            score, start, end = best_stretch(model, folder, question, tiny.picture(seed), most_tokens, **how)
            assert places(result.answers[0]) == (start, end)
            assert result.answers[0].score == pytest.approx(score, abs=1e-5)
            assert result.answers[0].text == " ".join(NAMES[start : end + 1])


def test_the_picture_counts(made: Any) -> None:
    model, folder = made(tiny.layoutlmv3)
    runner = media_runner(TASK, model, folder, CPU)
    pages = [items.DocumentQuestionInput(question="what total", image=tiny.png(seed), words=words()) for seed in (1, 2)]
    [one, other], _ = batched(runner, pages, {})
    assert one.answers[0].score != pytest.approx(other.answers[0].score, rel=1e-3)


def test_by_the_picture_alone(made: Any) -> None:
    model, folder = made(tiny.donut)
    runner = media_runner(TASK, model, folder, CPU)
    tokenizer, image_processor = hf.AutoTokenizer.from_pretrained(folder), hf.AutoImageProcessor.from_pretrained(folder)
    answers = []
    for seed in (1, 2, 3):
        page = items.DocumentQuestionInput(question="what color", image=tiny.png(seed))
        [result], _ = batched(runner, [page], {})
        prompt = "<s_docvqa><s_question>what color</s_question><s_answer>"
        sequences = model.generate(
            image_processor(tiny.picture(seed), return_tensors="pt").pixel_values,
            decoder_input_ids=tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids,
            max_length=64,  # the decoder's positions
        )
        text = tokenizer.decode(sequences[0]).removesuffix("[SEP]").partition("<s_answer>")[2]
        answers.append(text.rpartition("</s_answer>")[0].strip())
        assert [each.text for each in result.answers] == answers[-1:]
    assert any(answers)


def test_what_donut_cannot_honour(made: Any) -> None:
    model, folder = made(tiny.donut)
    runner = media_runner(TASK, model, folder, CPU)
    page = items.DocumentQuestionInput(question="what color", image=tiny.png(1))
    for name, value in (("doc_stride", 8), ("max_seq_len", 32), ("handle_impossible_answer", True)):
        with pytest.raises(InvalidField, match=f"parameters.{name}"):
            runner.prepare(page, {name: value})
    with pytest.raises(PromptTooLong, match="64"):
        runner.prepare(items.DocumentQuestionInput(question="color " * 60, image=tiny.png(1)), {})


def test_pages_that_cannot_be_read(made: Any) -> None:
    runner = media_runner(TASK, *made(tiny.layoutlm), CPU)
    picture = tiny.png(1)
    with pytest.raises(MissingDependency, match=r"document_question\.words.*OCR"):
        runner.prepare(items.DocumentQuestionInput(question="what is this", image=picture), {})
    with pytest.raises(InvalidField, match="doc_stride"):
        runner.prepare(items.DocumentQuestionInput(question="what " * 58, words=words()), {})
    with pytest.raises(PromptTooLong, match="no room"):
        runner.prepare(items.DocumentQuestionInput(question="what " * 70, words=words()), {})
    outside = (items.PageWord(text="total", box=items.Box(0, 0, 1001, 5)),)
    with pytest.raises(InvalidField, match=r"words\[0\].box"):
        runner.prepare(items.DocumentQuestionInput(question="what", words=outside), {})


@pytest.mark.parametrize("maker", [tiny.layoutlm, tiny.layoutlmv3])
def test_windows_end_where_the_model_does(made: Any, maker: tiny.Maker) -> None:
    runner = media_runner(TASK, *made(maker), CPU)
    page = items.DocumentQuestionInput(question="total", image=tiny.png(1), words=words() * 20)
    assert all(len(piece.payload.inputs["input_ids"][0]) <= 64 for piece in runner.prepare(page, {}))
    with pytest.raises(InvalidField, match=r"parameters\.max_seq_len.*64"):
        runner.prepare(page, {"max_seq_len": 65})


def test_a_model_that_looks_at_the_page_needs_all_of_it(made: Any, tmp_path: Path) -> None:
    model, folder = made(tiny.layoutlmv3)
    runner = media_runner(TASK, model, folder, CPU)
    with pytest.raises(MissingDependency, match="OCR"):
        runner.prepare(items.DocumentQuestionInput(question="what is this", image=tiny.png(1)), {})
    with pytest.raises(InvalidField, match=r"document_question\.image"):
        runner.prepare(items.DocumentQuestionInput(question="what is this", words=words()), {})
    hf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)  # and nothing that reads pictures
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadFailed, match="image_processor"):
        media_runner(TASK, model, tmp_path, CPU)


def test_models_that_read_no_pages_are_refused_by_name(made: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedField, match="LayoutLM, LayoutLMv3 and Donut"):
        media_runner(TASK, *made(tiny.vit_gpt2), CPU)


@pytest.mark.skipif(hf.utils.is_detectron2_available(), reason="detectron2 is there")
def test_layoutlm_2_says_what_it_lacks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = {"model_type": "layoutlmv2", "architectures": ["LayoutLMv2ForQuestionAnswering"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"qa_outputs.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MissingDependency, match="detectron2"):
        load_model(tmp_path, LoadOptions(device="cpu", task=TASK))


@pytest.mark.parametrize("maker", [tiny.layoutlm, tiny.layoutlmv3, tiny.donut])
def test_each_loads_for_the_task(made: Any, tmp_path: Path, maker: tiny.Maker) -> None:
    model, _ = made(maker)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, LoadOptions(device="cpu", task=TASK))
    assert type(loaded.model) is type(model)
