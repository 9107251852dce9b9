"""Embeddings are those of sentence-transformers: its formula, written out on the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parity.encoder_models import write_model
from tests.unit.tasks.driving import answers

from slipstream_server.inference.engine.task_assembly import assemble_tasks
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.tasks import items
from slipstream_server.tasks.items import TaskRequest, TaskResult

TEXTS = (
    "the old captain",
    "a storm at sea is one of the hot light ship",
    "hot",
    "marie curie won two prizes by the river",
)
TASKS = ("feature-extraction", "sentence-similarity", "text-ranking")


def reference(folder: Path, texts: Sequence[str], pooling: str) -> np.ndarray[Any, Any]:
    """Each text alone through the plain model, pooled by hand."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt"))[0][0].numpy()
            pooled = {"mean": hidden.mean(0), "max": hidden.max(0), "cls": hidden[0], "last_token": hidden[-1]}
            rows.append(pooled[pooling] / np.linalg.norm(pooled[pooling]))
    return np.stack(rows)


def run(folder: Path, requests: list[TaskRequest]) -> dict[int, list[TaskResult]]:
    config = WorkerConfig(model_folder=folder, engine="tasks", tasks=TASKS, load=LoadOptions(device="cpu"))
    engine, ready = assemble_tasks(config, lambda fraction, stage: None, lambda: None)
    assert ready.batching == "tasks"
    try:
        return answers(engine, requests)
    finally:
        engine.close()


def vector(result: TaskResult) -> np.ndarray[Any, Any]:
    assert isinstance(result, items.EmbeddingResult), result
    return np.frombuffer(result.vector.values, "<f4").reshape(result.vector.shape)


def test_pooling_similarity_and_ranking(tmp_path: Path) -> None:
    folder = write_model("bert-plain", tmp_path)
    poolings = ("mean", "max", "cls", "last_token")
    inputs = tuple(items.TextInput(text) for text in TEXTS)
    asked = [
        TaskRequest(id=n, task="feature-extraction", inputs=inputs, parameters={"pooling": pooling, "normalize": True})
        for n, pooling in enumerate(poolings)
    ]
    compared = items.SimilarityInput(TEXTS[0], TEXTS[1:])
    ranked = items.RankingInput(TEXTS[0], TEXTS[1:])
    options = {"top_k": 2, "return_documents": True}
    asked.append(TaskRequest(id=10, task="sentence-similarity", inputs=(compared,)))
    asked.append(TaskRequest(id=11, task="text-ranking", inputs=(ranked,), parameters=options))
    found = run(folder, asked)
    for number, pooling in enumerate(poolings):
        expected = reference(folder, TEXTS, pooling)
        np.testing.assert_allclose([vector(result) for result in found[number]], expected, atol=1e-5)
    units = reference(folder, TEXTS, "mean")
    cosines = units[1:] @ units[0]
    similar, order = found[10][0], found[11][0]
    assert isinstance(similar, items.SimilarityResult)
    assert isinstance(order, items.RankingResult)
    np.testing.assert_allclose(similar.scores, cosines, atol=1e-5)
    best = np.argsort(-cosines)[:2]
    assert [document.index for document in order.documents] == best.tolist()
    assert [document.document for document in order.documents] == [TEXTS[1 + index] for index in best]


def test_a_text_too_long_fails_alone_unless_it_may_be_cut(tmp_path: Path) -> None:
    folder = write_model("bert-plain", tmp_path)
    inputs = (items.TextInput("storm " * 100), items.TextInput("storm"))
    asked = [
        TaskRequest(id=number, task="feature-extraction", inputs=inputs, parameters={"truncation": truncation})
        for number, truncation in enumerate((False, True))
    ]
    found = run(folder, asked)
    refused = found[0][0]
    assert isinstance(refused, items.ItemError)
    assert refused.reason == "PROMPT_TOO_LONG"
    assert "102" in refused.message
    assert "64" in refused.message
    assert vector(found[0][1]).shape == (3, 32)
    assert vector(found[1][0]).shape == (64, 32)


@pytest.mark.slow
def test_minilm_embeds_as_sentence_transformers_does() -> None:
    from slipstream_server.models.sources import resolve

    folder = resolve("minilm-l6-v2").folder
    texts = [*TEXTS, "Größe 🙂 naïve café", "word " * 250]
    inputs = tuple(items.TextInput(text) for text in texts)
    found = run(folder, [TaskRequest(id=0, task="feature-extraction", inputs=inputs)])
    ours = np.stack([vector(result) for result in found[0]])
    cosines = (ours * reference(folder, texts, "mean")).sum(axis=1)
    assert cosines.min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-5)
