"""Plain Transformers: static left-padded batches of 16, one ``generate`` after the other, as a script would.

A batch runs until its longest answer is done; only the tokens that were asked for count. All of a batch come at its
end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tests.bench.engine.requests import Answer, Request
from tests.bench.engine.sides.loop import Clock, serve

BATCH_SIZE = 16


class GenerateSide:
    """The stock model and its ``generate``."""

    streams = False

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(arguments.threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model_folder, dtype=getattr(torch, arguments.dtype), local_files_only=True
        ).eval()
        # Without an end token every row runs on; min_new_tokens would ban it and so change the answers.
        self._model.generation_config.eos_token_id = None
        self._pad = self._model.generation_config.pad_token_id or 0

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "transformers": transformers.__version__, "batch_size": BATCH_SIZE}

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        if any(request.arrival_s for request in requests):
            raise ValueError("a static batch knows no arrivals")
        clock = Clock()
        answers = []
        for start in range(0, len(requests), BATCH_SIZE):
            batch = requests[start : start + BATCH_SIZE]
            rows = self._generate(batch)
            for request, row in zip(batch, rows, strict=True):
                answers.append(Answer())
                answers[-1].add(row[: request.max_new_tokens], clock.now_s())
        return answers

    def _generate(self, batch: Sequence[Request]) -> list[list[int]]:
        width = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[self._pad] * (width - len(each.prompt)) + list(each.prompt) for each in batch])
        mask = torch.tensor([[0] * (width - len(each.prompt)) + [1] * len(each.prompt) for each in batch])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(request.max_new_tokens for request in batch),
                pad_token_id=self._pad,
            )
        rows: list[list[int]] = output[:, width:].tolist()
        return rows


if __name__ == "__main__":
    serve(GenerateSide)
