"""The sentiment recipe on a tiny encoder and sentences that anybody could tell apart."""

from __future__ import annotations

import contextlib
import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from slipstream_server.models import sentiment
from slipstream_server.models.folder import check_model_folder

ModelCopy = Callable[[str], Path]


@pytest.fixture
def base(model_copy: ModelCopy, tmp_path: Path) -> Path:
    """An encoder without a head, and a tokenizer."""
    folder = model_copy("bert")
    config = BertConfig.from_pretrained(folder, num_hidden_layers=3)
    torch.manual_seed(3)
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    BertModel(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Positive ones are made of the words 0 to 99, negative ones of the words 100 to 199."""
    draw = random.Random(5)
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["text", "label", "source"])
        rows.writeheader()
        for number in range(500):
            label = number % 2
            words = [f"word{draw.randrange(100) + (0 if label else 100)}" for _ in range(draw.randrange(3, 20))]
            rows.writerow({"text": " ".join(words), "label": label, "source": "rotten_tomatoes"})
        rows.writerow({"text": "a whole page", "label": 0, "source": "imdb"})
    return tmp_path / "reviews.csv"


def test_it_learns_tells_its_progress_and_says_honestly_what_came_of_it(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sentiment, "_NUM_HELD_OUT", 100)
    monkeypatch.setattr(sentiment, "_NUM_EPOCHS", 40)
    target = tmp_path / "made"
    target.mkdir()
    assert sentiment.main(["--base", str(base), "--data", str(data), "--target", str(target)]) == 0
    *progress, answer = map(json.loads, capsys.readouterr().out.splitlines())
    fractions = [message["fraction"] for message in progress]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 0.2 < 0.8 < fractions[-1] < 1
    assert (answer["held_out_sentences"], answer["training_sentences"]) == ("100", "400")
    assert float(answer["held_out_accuracy"]) > 0.9
    # What it says of itself, counted again with transformers alone.
    check_model_folder(target)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    held_out = sentiment.read_examples(data)[:100]
    with torch.inference_mode():
        found = [model(**tokenizer(one.text, return_tensors="pt")).logits.argmax().item() for one in held_out]
    right = sum(label == one.label for label, one in zip(found, held_out, strict=True)) / 100
    assert abs(right - float(answer["held_out_accuracy"])) <= 0.01
    assert f"has not seen: {answer['held_out_accuracy']}" in (target / "README.md").read_text()


def test_the_shortcut_through_the_last_layer_computes_what_the_model_computes(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentiment, "_quick_products", contextlib.nullcontext)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = sentiment.read_examples(data)[:50]
    assert all(example.text != "a whole page" for example in examples)
    seen = sentiment._seen_by_last_layer(model, tokenizer, examples)
    with torch.no_grad():
        for batch, given in zip(seen, sentiment._batches(examples), strict=True):
            whole = model(**tokenizer([one.text for one in given], padding=True, return_tensors="pt")).logits
            torch.testing.assert_close(sentiment._logits(model, batch), whole, atol=1e-5, rtol=1e-4)
