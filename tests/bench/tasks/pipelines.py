"""The pipelines of the installed Transformers, as a program: one text at a time, or all in batches of one size.

First line out: ``{"ready": facts}``. Then for each ``{"work": ..., "texts": [...], "batch_size": ...}`` in, one
``{"seconds": ..., "values": [...]}`` out. Pipelines give the vectors of tokens: the mean over a text's own tokens is
taken here, as their users must. The lengths that this needs are counted before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers


class Pipelines:
    """One pipeline for each kind of work."""

    def __init__(self, encoder: str, classifier: str, device: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._features = transformers.pipeline("feature-extraction", encoder, device=device, dtype="float32")
        self._labels = transformers.pipeline("text-classification", classifier, device=device, dtype="float32")

    def run(self, work: str, texts: Sequence[str], batch_size: int) -> dict[str, Any]:
        """Seconds and values; ``batch_size`` 1: a call for each text, as it would come in."""
        lengths = [len(self._features.tokenizer(text, truncation=True)["input_ids"]) for text in texts]
        start_s = time.perf_counter()
        if work == "embed":
            found: list[Any] = self._embed(texts, lengths, batch_size)
        else:
            found = self._classify(texts, batch_size)
        return {"seconds": time.perf_counter() - start_s, "values": found}

    def _embed(self, texts: Sequence[str], lengths: Sequence[int], batch_size: int) -> list[list[float]]:
        options: dict[str, Any] = {"return_tensors": True, "tokenize_kwargs": {"truncation": True}}
        if batch_size == 1:
            hidden = [self._features(text, **options) for text in texts]
        else:
            hidden = self._features(list(texts), batch_size=batch_size, **options)
        return [_unit_mean(rows[0, :length]) for rows, length in zip(hidden, lengths, strict=True)]

    def _classify(self, texts: Sequence[str], batch_size: int) -> list[list[float]]:
        options: dict[str, Any] = {"top_k": None, "truncation": True}
        if batch_size == 1:
            # A list of one, because a text alone gives another nesting.
            found = [self._labels([text], **options)[0] for text in texts]
        else:
            found = self._labels(list(texts), batch_size=batch_size, **options)
        ids = self._labels.model.config.label2id
        return [[each["score"] for each in sorted(labels, key=lambda each: ids[each["label"]])] for labels in found]


def _unit_mean(rows_TH: torch.Tensor) -> list[float]:
    vector: list[float] = torch.nn.functional.normalize(rows_TH.mean(dim=0), dim=0).tolist()
    return vector


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("encoder", "classifier", "device"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    transformers.logging.set_verbosity_error()
    pipelines = Pipelines(arguments.encoder, arguments.classifier, arguments.device)
    print(json.dumps({"ready": {"torch": torch.__version__, "transformers": transformers.__version__}}), file=out)
    for line in sys.stdin:
        print(json.dumps(pipelines.run(**json.loads(line))), file=out)


if __name__ == "__main__":
    main()
