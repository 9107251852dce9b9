"""Fine-tunes a small encoder on labelled sentences, as a catalogue's recipe says:
``python -m slipstream_server.models.sentiment --help``.

Runs as a process of its own, like ``prepare``. Data, order and first weights of the head are seeded: the same machine
and build give the same model. The embeddings and the lower half of the layers stay as they are, which saves most of the
time and costs little. The accuracy on sentences it has not seen goes into the model's card and into the answer: the
last line on stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

_LABELS = ("NEGATIVE", "POSITIVE")
_SEED = 20_261_122
_SOURCE = "rotten_tomatoes"
_NUM_HELD_OUT = 1000
_NUM_TRAINING = 7000
_NUM_EPOCHS = 1
_BATCH_ROWS = 32
_MAX_TOKENS = 64
_PEAK_RATE = 2e-4
_WARM_UP_SHARE = 0.1
_MAX_FIELD_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Example:
    """A sentence and its label: 0 or 1."""

    text: str
    label: int


def read_examples(path: Path) -> list[Example]:
    """The sentences of the file that are single ones, in a seeded order that does not follow the labels."""
    csv.field_size_limit(_MAX_FIELD_BYTES)
    with path.open(encoding="utf-8", newline="") as file:
        found = [Example(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == _SOURCE]
    random.Random(_SEED).shuffle(found)  # noqa: S311
    return found


def fine_tune(base: Path, data: Path, target: Path) -> dict[str, str]:
    """Write the fine-tuned model into ``target``; returns what its provenance should say."""
    began_s = time.monotonic()
    examples = read_examples(data)
    held_out, training = examples[:_NUM_HELD_OUT], examples[_NUM_HELD_OUT : _NUM_HELD_OUT + _NUM_TRAINING]
    place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(base, **place)
    torch.manual_seed(_SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(_LABELS),
        id2label=dict(enumerate(_LABELS)),
        label2id={name: number for number, name in enumerate(_LABELS)},
        problem_type="single_label_classification",
        use_safetensors=True,
        **place,
    )
    _freeze_lower_half(model)
    _train(model, tokenizer, training)
    accuracy = _accuracy(model, tokenizer, held_out)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    facts = {
        "held_out_accuracy": f"{accuracy:.3f}",
        "held_out_sentences": str(len(held_out)),
        "training_sentences": str(len(training)),
        "seed": str(_SEED),
    }
    (target / "README.md").write_text(_card(facts), encoding="utf-8")
    return {**facts, "training_seconds": f"{time.monotonic() - began_s:.0f}", "transformers": transformers.__version__}


def _freeze_lower_half(model: Any) -> None:
    layers = model.base_model.encoder.layer
    for frozen in (model.base_model.embeddings, *layers[: len(layers) // 2]):
        frozen.requires_grad_(False)


def _train(model: Any, tokenizer: Any, examples: Sequence[Example]) -> None:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_PEAK_RATE, weight_decay=0.01)
    batches = [batch for epoch in range(_NUM_EPOCHS) for batch in _batches(examples, epoch)]
    warm_up = max(1, int(_WARM_UP_SHARE * len(batches)))
    for step, batch in enumerate(batches):
        share = (step + 1) / warm_up if step < warm_up else (len(batches) - step) / (len(batches) - warm_up)
        optimizer.param_groups[0]["lr"] = _PEAK_RATE * share
        loss = model(**_tensors(tokenizer, batch), labels=torch.tensor([e.label for e in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def _accuracy(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    model.eval()
    right = 0
    for batch in _batches(examples, 0):
        best = model(**_tensors(tokenizer, batch)).logits.argmax(dim=1).tolist()
        right += sum(label == example.label for label, example in zip(best, batch, strict=True))
    return right / len(examples)


def _batches(examples: Sequence[Example], epoch: int) -> Iterator[list[Example]]:
    """Batches of sentences of about one length, in a seeded order."""
    by_length = sorted(examples, key=lambda example: len(example.text))
    batches = [by_length[first : first + _BATCH_ROWS] for first in range(0, len(by_length), _BATCH_ROWS)]
    random.Random(_SEED + epoch).shuffle(batches)  # noqa: S311
    yield from batches


def _tensors(tokenizer: Any, batch: Sequence[Example]) -> Any:
    texts = [example.text for example in batch]
    return tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")


def _card(facts: dict[str, str]) -> str:
    return (
        "---\nlicense: apache-2.0\npipeline_tag: text-classification\n---\n\n# minilm-sentiment\n\n"
        "all-MiniLM-L6-v2, fine-tuned on this machine on film reviews of one sentence: NEGATIVE or POSITIVE.\n\n"
        f"Accuracy on {facts['held_out_sentences']} sentences that it has not seen: {facts['held_out_accuracy']} "
        f"({facts['training_sentences']} sentences of training, seed {facts['seed']}).\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slipstream_server.models.sentiment", description="Fine-tune.")
    parser.add_argument("--base", type=Path, required=True, help="a prepared folder of an encoder")
    parser.add_argument("--data", type=Path, required=True, help="a CSV file with text, label and source")
    parser.add_argument("--target", type=Path, required=True, help="an existing folder to fill")
    options = parser.parse_args(arguments)
    try:
        answer, status = fine_tune(options.base, options.data, options.target), 0
    except Exception as error:
        traceback.print_exc()
        answer = {"error": "ModelLoadFailed", "message": f"the model could not be fine-tuned ({type(error).__name__})"}
        status = 1
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
