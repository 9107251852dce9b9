"""Which runner does which task, and what of a model folder it needs. Worker side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from slipstream_server.errors import InvalidField
from slipstream_server.tasks.runner import Runner
from slipstream_server.tasks.text.classification import TextClassification, ZeroShotClassification
from slipstream_server.tasks.text.embedding import Embedder, EmbeddingRanking, FeatureExtraction, SentenceSimilarity
from slipstream_server.tasks.text.fill_mask import FillMask
from slipstream_server.tasks.text.model import TextModel
from slipstream_server.tasks.text.question_answering import QuestionAnswering
from slipstream_server.tasks.text.ranking import CrossEncoderRanking
from slipstream_server.tasks.text.sentence_folder import read_sentence_settings
from slipstream_server.tasks.text.table_questions import CellSelection, WrittenTableAnswer
from slipstream_server.tasks.text.token_classification import TokenClassification
from slipstream_server.tasks.text.tokens import TextEncoder

_BY_HEAD: Mapping[str, Callable[[TextModel], Runner]] = {
    "text-classification": TextClassification,
    "zero-shot-classification": ZeroShotClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "fill-mask": FillMask,
}
_BY_EMBEDDING: Mapping[str, Callable[[Embedder], Runner]] = {
    "feature-extraction": FeatureExtraction,
    "sentence-similarity": SentenceSimilarity,
    "text-ranking": EmbeddingRanking,
}


def text_runner(
    task_id: str, model: Any, folder: Path, device: torch.device, *, context_tokens: int | None, tokenizer: Any = None
) -> Runner:
    """The runner of a task on ``model``, which is loaded, in eval mode and on ``device``.

    ``tokenizer`` is read from the model's prepared ``folder`` where none is given. Raises InvalidField for a task that
    is none of these, ModelLoadFailed or MissingDependency where the tokenizer does not do.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(folder)
    if task_id == "table-question-answering" and hasattr(model.config, "aggregation_labels"):
        return CellSelection(model, tokenizer, device, context_tokens)
    text_model = TextModel(model, TextEncoder(tokenizer, context_tokens), device)
    if task_id == "table-question-answering":
        return WrittenTableAnswer(text_model)
    if task_id in _BY_HEAD:
        return _BY_HEAD[task_id](text_model)
    if task_id == "text-ranking" and type(model).__name__.endswith("ForSequenceClassification"):
        return CrossEncoderRanking(text_model)
    if task_id in _BY_EMBEDDING:
        return _BY_EMBEDDING[task_id](Embedder(text_model, read_sentence_settings(folder)))
    raise InvalidField.of("task", f"{task_id!r} is no task on text")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a prepared folder, as Transformers has it; no code of the model's own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
