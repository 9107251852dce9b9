"""Writes golden_generation.json: what the pipelines of transformers 4.57.6 say that version 5 removed.

Run it in an environment with that release: ``.peers/transformers4/bin/python tests/parity/make_golden_generation.py``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from seq2seq_models import write_model

_TEXTS = [
    "the ship was in the storm and the light of the house",
    "he had a hot word for it",
    "sail to sea, 42 times!",
]
CASES: list[dict[str, Any]] = [
    {"model": "t5", "task": "summarization"},
    {"model": "t5", "task": "summarization", "parameters": {"max_new_tokens": 12}},
    {"model": "t5", "task": "summarization", "parameters": {"num_beams": 1, "max_new_tokens": 20}},
    {"model": "t5", "task": "translation", "parameters": {"max_new_tokens": 24}},
    {"model": "t5", "task": "translation_en_to_fr", "parameters": {"max_new_tokens": 16}},
    {"model": "t5", "task": "text2text-generation", "parameters": {"max_new_tokens": 24}},
    {"model": "t5", "task": "text2text-generation", "parameters": {"max_new_tokens": 12, "min_length": 8}},
    {
        "model": "t5",
        "task": "text2text-generation",
        "parameters": {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 3},
    },
    {"model": "t5", "task": "text2text-generation", "parameters": {"max_new_tokens": 20, "repetition_penalty": 1.5}},
    {"model": "bart", "task": "summarization"},
    {"model": "bart", "task": "summarization", "parameters": {"max_length": 12, "min_length": 2}},
    {"model": "bart", "task": "text2text-generation", "parameters": {"num_beams": 1}},
    {"model": "bart", "task": "text2text-generation", "parameters": {"num_beams": 2, "length_penalty": 0.5}},
    {
        "model": "mbart",
        "task": "translation",
        "parameters": {"src_lang": "en_XX", "tgt_lang": "de_DE", "max_new_tokens": 20},
    },
    {"model": "mbart", "task": "translation", "parameters": {"src_lang": "fr_XX", "tgt_lang": "en_XX"}},
    {
        "model": "mbart",
        "task": "translation",
        "parameters": {"src_lang": "fr_XX", "tgt_lang": "ro_RO", "max_new_tokens": 14, "num_beams": 1},
    },
    {"model": "marian", "task": "translation"},
    {"model": "marian", "task": "translation_en_to_de", "parameters": {"num_beams": 1, "max_length": 15}},
]


def main() -> None:
    found = []
    with tempfile.TemporaryDirectory() as place:
        folders = {kind: str(write_model(Path(place) / kind, kind)) for kind in ("t5", "bart", "mbart", "marian")}
        for case in CASES:
            # A pipeline for each case: version 4 takes the prefix out of the configuration that it is given.
            pipeline = transformers.pipeline(case["task"], model=folders[case["model"]])
            answers = []
            for text in _TEXTS:
                records = pipeline(text, **case.get("parameters", {}))
                answers.append([next(iter(record.values())) for record in records])
            found.append({**case, "texts": _TEXTS, "answers": answers})
    golden = {"transformers": transformers.__version__, "cases": found}
    path = Path(__file__).with_name("golden_generation.json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
