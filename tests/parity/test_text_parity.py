"""The tasks on text give what Transformers' pipelines give: those of 4.57.6 by ``golden_text.json`` (written by
``make_golden_text.py``), those that are left by running them here. All cases of a model go through the engine together,
so that batching may change nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.parity.encoder_models import MODELS, write_model
from tests.parity.text_cases import cases
from tests.unit.tasks.driving import answers

from slipstream_server.inference.engine.side_by_side import SideBySide
from slipstream_server.inference.engine.task_assembly import runners_for
from slipstream_server.inference.engine.tasks import TaskEngine
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.models.loading import load_model
from slipstream_server.tasks import items
from slipstream_server.tasks.batching import TaskLimits
from slipstream_server.tasks.items import TaskRequest, TaskResult

GOLDEN = json.loads(Path(__file__).with_name("golden_text.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4
TABLE_WORDS = ("how many stars has the ship", "boat sea storm name count")
LEFT_IN_5 = ("text-classification", "zero-shot-classification", "token-classification", "fill-mask")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("encoders")

    def get(model: str) -> Path:
        return root / model if (root / model).exists() else write_model(model, root / model)

    return get


def ours(folder: Path, task_id: str, requests: list[TaskRequest]) -> dict[int, list[TaskResult]]:
    loaded = load_model(folder, LoadOptions(device="cpu", task=task_id))
    runners = runners_for([task_id], loaded, folder)
    limits = TaskLimits(max_batch_size=8, max_batch_tokens=512, max_queue_delay_ms=0)
    engine = TaskEngine(runners, limits, run=SideBySide().run)
    try:
        return answers(engine, requests)
    finally:
        engine.close()


def given(case: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The case as our task takes it."""
    value, parameters = case["input"], dict(case["parameters"])
    if isinstance(value, str):
        return items.TextInput(value), parameters
    if case["task"] == "text-classification":
        return items.TextPairInput(value["text"], value["text_pair"]), parameters
    if case["task"] == "question-answering":
        return items.QuestionAnsweringInput(value["question"], value["context"]), parameters
    template = parameters.pop("hypothesis_template", value.get("hypothesis_template"))
    return items.ZeroShotInput(value["sequences"], tuple(value["candidate_labels"]), template), parameters


def plain(result: Any) -> Any:
    """Our result in the pipelines' words."""
    if isinstance(result, items.TokenClassificationResult):
        return [
            {"label": s.label, "score": s.score, "word": s.word, "start": s.start_char, "end": s.end_char}
            for s in result.spans
        ]
    if isinstance(result, items.QuestionAnsweringResult):
        spans = [(answer, answer.character_span or items.CharacterSpan(-1, -1)) for answer in result.answers]
        return [{"answer": a.text, "score": a.score, "start": s.start_char, "end": s.end_char} for a, s in spans]
    if isinstance(result, items.FillMaskResult):
        return [
            {"token": f.token_id, "token_str": f.token, "sequence": f.sequence, "score": f.score}
            for mask in result.masks
            for f in mask
        ]
    assert isinstance(result, items.ClassificationResult), result
    return [{"label": label.label, "score": label.score} for label in result.labels]


def theirs(answer: Any) -> Any:
    """Their result, always as a flat list, with one name for one thing."""
    if isinstance(answer, dict) and "labels" in answer:
        pairs = zip(answer["labels"], answer["scores"], strict=True)
        return [{"label": label, "score": score} for label, score in pairs]
    found = answer if isinstance(answer, list) else [answer]
    flat = [part for one in found for part in (one if isinstance(one, list) else [one])]
    for one in flat:
        if "entity" in one or "entity_group" in one:
            one["label"] = one.pop("entity", None) or one.pop("entity_group")
            one.pop("index", None)
    return flat


def assert_same(mine: list[dict[str, Any]], expected: list[dict[str, Any]], case: dict[str, Any]) -> None:
    assert [{**one, "score": 0} for one in mine] == [{**one, "score": 0} for one in expected], case
    for one, other in zip(mine, expected, strict=True):
        assert math.isclose(one["score"], other["score"], abs_tol=TOLERANCE, rel_tol=TOLERANCE), case


@pytest.mark.parametrize("model", [name for name in MODELS if name != "bert-plain"])
def test_the_pipelines_of_4_57_and_of_today(model: str, folder_of: Callable[[str], Path]) -> None:
    import transformers

    mine = [(case, golden) for case, golden in zip(cases(), GOLDEN["answers"], strict=True) if case["model"] == model]
    task_id = mine[0][0]["task"]
    requests = []
    for number, (case, _) in enumerate(mine):
        item, parameters = given(case)
        requests.append(TaskRequest(id=number, task=task_id, inputs=(item,), parameters=parameters))
    found = ours(folder_of(model), task_id, requests)
    oracle = transformers.pipeline(task_id, model=str(folder_of(model)), device="cpu") if task_id in LEFT_IN_5 else None
    for number, (case, golden) in enumerate(mine):
        result = plain(found[number][0])
        assert_same(result, theirs(golden), case)
        if oracle is not None:
            value = case["input"]
            is_plain = isinstance(value, str) or task_id == "text-classification"
            live = oracle(value, **case["parameters"]) if is_plain else oracle(**value, **case["parameters"])
            assert_same(result, theirs(live), case)


def test_feature_extraction_gives_the_pipelines_vectors(folder_of: Callable[[str], Path]) -> None:
    import transformers

    folder = folder_of("bert-plain")
    texts = ["the old captain", "it was one of the storm and the ship sailed by", "hot"]
    oracle = transformers.pipeline("feature-extraction", model=str(folder), device="cpu")
    request = TaskRequest(id=0, task="feature-extraction", inputs=tuple(items.TextInput(text) for text in texts))
    for text, result in zip(texts, ours(folder, "feature-extraction", [request])[0], strict=True):
        assert isinstance(result, items.EmbeddingResult)
        vectors = np.frombuffer(result.vector.values, "<f4").reshape(result.vector.shape)
        np.testing.assert_allclose(vectors, np.array(oracle(text))[0], atol=TOLERANCE)
        assert result.num_tokens == len(vectors)


def test_tapas_points_at_the_pipelines_cells(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    import torch
    import transformers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EMPTY]"]
    words = specials + " ".join((*TABLE_WORDS, "1 2 3 4 5 12")).split(" ")
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = transformers.TapasTokenizer(vocab_file=str(tmp_path / "vocab.txt"), model_max_length=64)
    config = transformers.TapasConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_aggregation_labels=4, type_vocab_sizes=[3, 256, 256, 2, 256, 256, 10],
        aggregation_labels={0: "NONE", 1: "SUM", 2: "AVERAGE", 3: "COUNT"}, no_aggregation_label_index=0,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.TapasForQuestionAnswering(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    columns, rows = ("name", "count"), (("ship", "12"), ("boat", "3"), ("storm", "5"))
    queries = ("how many stars has the ship", "count", "the sea", "name the boat 1 2 3")
    oracle = transformers.pipeline("table-question-answering", model=model, tokenizer=tokenizer, device="cpu")
    asked = tuple(items.TableQuestionInput(query, columns, rows) for query in queries)
    request = TaskRequest(id=0, task="table-question-answering", inputs=asked)
    table = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
    chosen = 0
    for query, result in zip(queries, ours(tmp_path, "table-question-answering", [request])[0], strict=True):
        live = oracle(table=table, query=query)
        assert isinstance(result, items.QuestionAnsweringResult), result
        answer = result.answers[0]
        assert answer.table is not None
        assert answer.text == live["answer"]
        assert answer.table.aggregator == live["aggregator"]
        assert [(cell.row_index, cell.column_index) for cell in answer.table.cells] == live["coordinates"]
        assert [cell.text for cell in answer.table.cells] == live["cells"]
        chosen += len(answer.table.cells)
    assert chosen, "no cell was ever chosen: the case shows nothing"


LONG = "the old captain " * 40
QUESTION = items.QuestionAnsweringInput("who", LONG)
BROKEN: list[tuple[str, str, items.TaskInput, dict[str, Any], str]] = [
    ("bert-qa", "question-answering", items.QuestionAnsweringInput(LONG, "a"), {}, "question_answering.question"),
    ("bert-qa", "question-answering", QUESTION, {"max_seq_len": 65}, "parameters.max_seq_len"),
    ("bert-qa", "question-answering", QUESTION, {"max_seq_len": 10, "doc_stride": 9}, "parameters.doc_stride"),
    ("bert-ner", "token-classification", items.WordsInput(tuple(LONG.split())), {}, "words.words"),
    ("bert-ner", "token-classification", items.TextInput("a"), {"stride": 1}, "parameters.stride"),
    ("bert-mask", "fill-mask", items.TextInput("[MASK]"), {"targets": [""]}, "parameters.targets"),
    ("bert-nli", "zero-shot-classification", items.ZeroShotInput("a", (LONG,), None), {}, "zero_shot.text"),
    ("bert-classes", "text-ranking", items.RankingInput("a", (LONG,)), {}, "ranking.documents"),
]


@pytest.mark.parametrize("model", sorted({case[0] for case in BROKEN}))
def test_what_cannot_be_read_is_named_as_the_contract_does(model: str, folder_of: Callable[[str], Path]) -> None:
    cases_of_model = [case for case in BROKEN if case[0] == model]
    requests = [
        TaskRequest(id=number, task=task_id, inputs=(item,), parameters=parameters)
        for number, (_, task_id, item, parameters, _) in enumerate(cases_of_model)
    ]
    found = ours(folder_of(model), cases_of_model[0][1], requests)
    for number, case in enumerate(cases_of_model):
        assert isinstance(found[number][0], items.ItemError), case
        assert found[number][0].field == case[-1]
