"""From logits to scores, and the best of them. Torch-free; side threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from slipstream_server.tasks.items import LabelScore

FloatArray: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]


def softmax(logits: FloatArray) -> FloatArray:
    """Along the last dimension."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: FloatArray) -> FloatArray:
    """Without overflow at either end."""
    return np.exp(-np.logaddexp(0.0, -logits))


def best_labels(names: Sequence[str], scores: FloatArray, top_k: int | None) -> list[LabelScore]:
    """Names and scores, best first and of equals the lower id first."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [LabelScore(names[index], float(scores[index]), int(index)) for index in order]
