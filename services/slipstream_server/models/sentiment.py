"""Fine-tunes a small encoder on labelled sentences, as a catalogue's recipe says:
``python -m slipstream_server.models.sentiment --help``.

    sentences -> every layer but the last, once -> what the last layer sees -> last layer, pooler and head: trained

Somebody waits for it, so it takes seconds: what the frozen layers say of a sentence is computed once and kept, and of
the last layer only the first token's row is computed, the one that the pooler reads. Training more layers takes several
times as long and gains nothing here.

Runs as a process of its own, like ``prepare``. Data, order and first weights of the head are seeded: the same machine
and build give the same model. The accuracy on sentences it has not seen, measured on the whole model, goes into the
model's card and into the answer: lines on stdout are JSON objects that tell the fraction done, the last one the result.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
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
_NUM_EPOCHS = 2
_BATCH_ROWS = 32
_MAX_TOKENS = 64
_PEAK_RATE = 8e-4
_WARM_UP_SHARE = 0.1
_MAX_FIELD_BYTES = 1024 * 1024
# How far the recipe is once the frozen layers are done, and once the training is: by the time that they take.
_FROZEN_SHARE = 0.7
_TRAINED_SHARE = 0.9


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
    _train(model, _seen_by_last_layer(model, tokenizer, training))
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


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch as the last layer sees it: hidden states [row, token, width], which tokens are there, labels."""

    hidden_BTD: torch.Tensor
    mask_B11T: torch.Tensor
    labels_B: torch.Tensor


def _quick_products() -> torch.autocast:
    """Products of bfloat16 where the processor has them: nearly three times as fast. Sums and weights stay float32.

    For one step at a time: as long as it lasts, what was made of the weights is kept, whatever becomes of them.
    """
    capabilities: Mapping[str, bool] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # newer than the oldest torch that is allowed
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(capabilities.get("avx512_bf16")))


@torch.no_grad()
def _seen_by_last_layer(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[Seen]:
    model.eval()
    found: list[Seen] = []
    bert, inputs = model.base_model, {}

    def keep(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs["hidden"] = args[0] if args else kwargs["hidden_states"]

    hook = bert.encoder.layer[-1].register_forward_pre_hook(keep, with_kwargs=True)
    batches = list(_batches(examples))
    for number, batch in enumerate(batches):
        tensors = _tensors(tokenizer, batch)
        with _quick_products():
            bert(**tensors)
        labels = torch.tensor([example.label for example in batch])
        found.append(Seen(inputs["hidden"].float(), tensors["attention_mask"][:, None, None, :].bool(), labels))
        _tell(_FROZEN_SHARE * (number + 1) / len(batches))
    hook.remove()
    return found


def _train(model: Any, batches: Sequence[Seen]) -> None:
    model.train()
    parts = (model.base_model.encoder.layer[-1], model.base_model.pooler, model.classifier)
    trained = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=_PEAK_RATE, weight_decay=0.01)
    order = random.Random(_SEED)  # noqa: S311
    steps = [batch for _ in range(_NUM_EPOCHS) for batch in order.sample(batches, len(batches))]
    warm_up = max(1, int(_WARM_UP_SHARE * len(steps)))
    for step, batch in enumerate(steps):
        share = (step + 1) / warm_up if step < warm_up else (len(steps) - step) / (len(steps) - warm_up)
        optimizer.param_groups[0]["lr"] = _PEAK_RATE * share
        with _quick_products():
            logits_BV = _logits(model, batch)
        loss: Any = torch.nn.functional.cross_entropy(logits_BV.float(), batch.labels_B)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _tell(_FROZEN_SHARE + (_TRAINED_SHARE - _FROZEN_SHARE) * (step + 1) / len(steps))


def _logits(model: Any, batch: Seen) -> torch.Tensor:
    """What the model makes of a batch, by the last layer's row of the first token alone."""
    layer = model.base_model.encoder.layer[-1]
    attention = layer.attention.self
    first = batch.hidden_BTD[:, :1]

    def heads(rows: Any) -> Any:
        return rows.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    mixed = torch.nn.functional.scaled_dot_product_attention(
        heads(attention.query(first)),
        heads(attention.key(batch.hidden_BTD)),
        heads(attention.value(batch.hidden_BTD)),
        attn_mask=batch.mask_B11T,
    )
    attended = layer.attention.output(mixed.transpose(1, 2).flatten(2), first)
    pooled = model.base_model.pooler(layer.output(layer.intermediate(attended), attended))
    logits: torch.Tensor = model.classifier(model.dropout(pooled))
    return logits


@torch.inference_mode()
def _accuracy(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    model.eval()
    right = 0
    for batch in _batches(examples):
        best = model(**_tensors(tokenizer, batch)).logits.argmax(dim=1).tolist()
        right += sum(label == example.label for label, example in zip(best, batch, strict=True))
    return right / len(examples)


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Batches of sentences of about one length."""
    by_length = sorted(examples, key=lambda example: len(example.text))
    return (by_length[first : first + _BATCH_ROWS] for first in range(0, len(by_length), _BATCH_ROWS))


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


def _tell(fraction: float) -> None:
    _write({"fraction": round(fraction, 3)})


def _write(message: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


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
    _write(answer)
    return status


if __name__ == "__main__":
    sys.exit(main())
