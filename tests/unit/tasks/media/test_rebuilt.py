"""The tasks that Transformers 5 dropped, against what version 4.57.6 answered on the same weights."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from parity.make_golden_media import GOLDEN, QUESTIONS, SEEDS
from slipstream_server.errors import PromptTooLong
from slipstream_server.tasks import items
from slipstream_server.tasks.media.runners import media_runner
from unit.tasks.media import tiny_media as tiny

ANSWERS = json.loads(GOLDEN.read_text())


def together(runner: Any, inputs: list[Any], parameters: dict[str, Any]) -> list[Any]:
    """All inputs in one forward pass where their shapes agree, else one by one."""
    pieces = [runner.prepare(item, parameters) for item in inputs]
    assert all(len(each) == 1 for each in pieces)
    groups = {each[0].group for each in pieces}
    whole = [each[0] for each in pieces]
    raw = runner.run(whole) if len(groups) == 1 else [runner.run([piece])[0] for piece in whole]
    return [runner.finish(item, parameters, [each]) for item, each in zip(inputs, raw, strict=True)]


def picture(seed: int) -> bytes:
    return tiny.png(seed, 24, 16)


@pytest.mark.parametrize("question", range(len(QUESTIONS)))
def test_answers_of_a_list(tmp_path: Path, question: int) -> None:
    runner = media_runner("visual-question-answering", tiny.vilt(tmp_path), tmp_path, torch.device("cpu"))
    inputs = [items.VisualQuestionInput(image=picture(seed), question=QUESTIONS[question]) for seed in SEEDS]
    results = together(runner, inputs, {"top_k": 3})
    for result, expected in zip(results, (each[question] for each in ANSWERS["vilt"]), strict=True):
        assert [each.text for each in result.answers] == [each["answer"] for each in expected]
        assert [each.score for each in result.answers] == pytest.approx([e["score"] for e in expected], abs=1e-4)


def test_answers_in_words(tmp_path: Path) -> None:
    runner = media_runner("visual-question-answering", tiny.blip_questions(tmp_path), tmp_path, torch.device("cpu"))
    for index, question in enumerate(QUESTIONS):
        inputs = [items.VisualQuestionInput(image=picture(seed), question=question) for seed in SEEDS]
        for result, expected in zip(together(runner, inputs, {}), ANSWERS["blip_questions"], strict=True):
            assert [each.text for each in result.answers] == [each["answer"] for each in expected[index]]


@pytest.mark.parametrize(("maker", "limit"), [(tiny.vilt, 40), (tiny.blip_questions, 64)])
def test_a_question_that_is_too_long(tmp_path: Path, maker: tiny.Maker, limit: int) -> None:
    runner = media_runner("visual-question-answering", maker(tmp_path), tmp_path, torch.device("cpu"))
    with pytest.raises(PromptTooLong, match=f"the model reads {limit}"):
        runner.prepare(items.VisualQuestionInput(image=picture(0), question="cat " * 100), {})


def test_image_to_image(tmp_path: Path) -> None:
    runner = media_runner("image-to-image", tiny.swin2sr(tmp_path), tmp_path, torch.device("cpu"))
    results = together(runner, [items.ImageInput(data=picture(seed)) for seed in SEEDS], {})
    for result, expected in zip(results, ANSWERS["swin2sr"], strict=True):
        found = np.asarray(Image.open(io.BytesIO(result.image.png)))
        wanted = np.frombuffer(base64.b64decode(expected["pixels"]), np.uint8).reshape(expected["shape"])
        assert found.shape == wanted.shape
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("name", "words"), [("blip_captions", ""), ("blip_captions a photo", "a photo"), ("vit_gpt2", "")]
)
def test_captions(tmp_path: Path, name: str, words: str) -> None:
    model = getattr(tiny, name.split()[0])(tmp_path)
    runner = media_runner("image-text-to-text", model, tmp_path, torch.device("cpu"))
    inputs: list[Any] = [items.ImageInput(data=picture(seed)) for seed in SEEDS]
    if words:
        inputs = [items.MultimodalInput(parts=(each, items.TextInput(text=words))) for each in inputs]
    results = together(runner, inputs, {"max_new_tokens": 8})
    assert [result.texts[0].text.strip() for result in results] == [each.strip() for each in ANSWERS[name]]
    several = together(runner, inputs, {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2})
    assert [len(result.texts) for result in several] == [2, 2]
