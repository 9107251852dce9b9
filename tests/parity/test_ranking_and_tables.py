"""Cross-encoders and models that write about tables, for which Transformers 5 has no pipeline: its model classes, on
what they were trained to read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.parity.encoder_models import write_model

from slipstream_server.errors import InvalidField, PromptTooLong
from slipstream_server.inference.engine.task_assembly import runner_for
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.models.loading import load_model
from slipstream_server.tasks import items
from unit.tasks.media import tiny_media as tiny
from unit.tasks.media.side_by_side import batched

QUERY = "who lived near the harbour"
DOCUMENTS = ("the old captain lived near the harbour", "a storm", "Marie Curie won two prizes", "hot light")


def served(task: str, folder: Path) -> Any:
    return runner_for(task, load_model(folder, LoadOptions(device="cpu", task=task)), folder)


@pytest.mark.parametrize("function", ["sigmoid", "none"])
@pytest.mark.parametrize("model", ["bert-regression", "bert-classes"])
def test_cross_encoders_rank_by_their_logits(tmp_path: Path, model: str, function: str) -> None:
    write_model(model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for document in DOCUMENTS:
        with torch.inference_mode():
            logits = plain(**tokenizer(QUERY, document, return_tensors="pt")).logits[0]
        score = logits[-1] if function == "none" else logits.sigmoid()[0] if len(logits) == 1 else logits.softmax(0)[-1]
        expected.append(float(score))
    runner = served("text-ranking", tmp_path)
    asked = items.RankingInput(QUERY, DOCUMENTS)
    with torch.inference_mode():
        [result], _ = batched(runner, [asked], {"function_to_apply": function, "top_k": 3})
    order = np.argsort(-np.array(expected), kind="stable")[:3]
    assert [each.index for each in result.documents] == order.tolist()
    assert [each.score for each in result.documents] == pytest.approx([expected[index] for index in order], abs=1e-5)


COLUMNS, ROWS = ("page", "number"), (("on", "42"), ("this", "7"))


@pytest.fixture
def table_writer(tmp_path: Path) -> tuple[Any, Any, Path]:
    model = tiny.bart(tmp_path)
    model.save_pretrained(tmp_path)
    return model, transformers.AutoTokenizer.from_pretrained(tmp_path), tmp_path


def written(model: Any, tokenizer: Any, text: str, **how: Any) -> str:
    """TAPEX lower-cases the question and the table, written out row by row, and sets a space before them."""
    inputs = tokenizer(" " + text, return_tensors="pt", return_token_type_ids=False)
    return str(tokenizer.decode(model.generate(**inputs, max_length=None, **how)[0], skip_special_tokens=True))


def test_a_table_is_read_as_one_line(table_writer: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = table_writer
    runner = served("table-question-answering", folder)
    queries = ("What is the TOTAL", "what color is this page")
    asked = [items.TableQuestionInput(query, COLUMNS, ROWS) for query in queries]
    with torch.inference_mode():
        results, largest = batched(runner, asked, {"max_new_tokens": 8})
        assert largest == 2
        for query, result in zip(queries, results, strict=True):
            line = f"{query.lower()} col : page | number row 1 : on | 42 row 2 : this | 7"
            assert result.answers[0].text == written(model, tokenizer, line, max_new_tokens=8)
    assert any(result.answers[0].text for result in results)


def test_answers_about_tables_end_where_the_decoder_does(table_writer: tuple[Any, Any, Path]) -> None:
    model, tokenizer, folder = table_writer
    runner = served("table-question-answering", folder)
    asked = items.TableQuestionInput("total", COLUMNS, ROWS)
    with torch.inference_mode():
        [result], _ = batched(runner, [asked], {})
        line = "total col : page | number row 1 : on | 42 row 2 : this | 7"
        assert result.answers[0].text == written(model, tokenizer, line, max_new_tokens=63)
    with pytest.raises(InvalidField, match=r"parameters\.max_new_tokens.*63"):
        runner.prepare(asked, {"max_new_tokens": 64})
    long_table = items.TableQuestionInput("total", COLUMNS, ROWS * 20)
    with pytest.raises(PromptTooLong, match=r"table_question\.table"):
        runner.prepare(long_table, {})
    assert runner.prepare(long_table, {"truncation": True})[0].size <= 64
