"""Writes golden_text.json: what the pipelines of the release that runs this say to the cases.

.peers/transformers4/bin/python tests/parity/make_golden_text.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).parent))
from encoder_models import write_model  # type: ignore[import-not-found,unused-ignore]
from text_cases import cases  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    made: dict[tuple[str, str], Any] = {}
    answers = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases():
            key = (case["model"], case["task"])
            if key not in made:
                folder = write_model(case["model"], Path(scratch, case["model"]))
                made[key] = pipeline(case["task"], model=str(folder), device="cpu")
            answers.append(ask(made[key], case))
    golden = {"transformers": transformers.__version__, "answers": answers}
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"), default=float)
    Path(__file__).with_name("golden_text.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(answers)} answers of transformers {transformers.__version__}, {len(text)} bytes")


def ask(oracle: Any, case: dict[str, Any]) -> Any:
    """The pipeline's own answer to one case."""
    given = case["input"]
    if isinstance(given, str) or case["task"] == "text-classification":
        return oracle(given, **case["parameters"])
    return oracle(**given, **case["parameters"])


if __name__ == "__main__":
    main()
