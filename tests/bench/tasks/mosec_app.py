"""The same work as a mosec service, as its guide shows it: a function over a batch, which the server gathers.

Runs in mosec's own environment, with torch and Transformers of the same releases. ``TASKS_ENCODER``,
``TASKS_CLASSIFIER``, ``TASKS_DEVICE`` and ``TASKS_BATCH_SIZE`` say what to load. Texts come in and float32 numbers go
out as they are, which costs less than JSON.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from mosec import Server, Worker  # type: ignore[import-not-found]  # it lies in an environment of its own

MAX_WAIT_MS = 10
TIMEOUT_S = 120


class _Text(Worker):  # type: ignore[misc]
    """Text in, numbers out."""

    resp_mime_type = "application/octet-stream"

    def load(self, auto_class: Any, folder: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = os.environ["TASKS_DEVICE"]
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._model = auto_class.from_pretrained(folder, dtype=torch.float32).eval().to(self._device)

    def inputs(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self._device)

    def deserialize(self, data: bytes) -> str:
        return data.decode()

    def serialize(self, data: Any) -> bytes:
        return bytes(data.tobytes())


class Embed(_Text):
    def __init__(self) -> None:
        super().__init__()
        self.load(transformers.AutoModel, os.environ["TASKS_ENCODER"])

    @torch.inference_mode()
    def forward(self, data: Sequence[str]) -> list[Any]:
        inputs = self.inputs(data)
        mask_BT1 = inputs["attention_mask"].unsqueeze(-1).float()
        hidden_BTH = self._model(**inputs).last_hidden_state
        mean_BH = (hidden_BTH * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)
        return list(torch.nn.functional.normalize(mean_BH, dim=1).cpu().numpy())


class Classify(_Text):
    def __init__(self) -> None:
        super().__init__()
        self.load(transformers.AutoModelForSequenceClassification, os.environ["TASKS_CLASSIFIER"])

    @torch.inference_mode()
    def forward(self, data: Sequence[str]) -> list[Any]:
        return list(self._model(**self.inputs(data)).logits.softmax(dim=1).cpu().numpy())


if __name__ == "__main__":
    server = Server()
    batch_size = int(os.environ["TASKS_BATCH_SIZE"])
    for worker in (Embed, Classify):
        route = f"/{worker.__name__.lower()}"
        server.append_worker(
            worker, max_batch_size=batch_size, max_wait_time=MAX_WAIT_MS, timeout=TIMEOUT_S, route=route
        )
    server.run()
