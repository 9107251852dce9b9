"""The seam between the task engine and what a task does: prepare on a helper thread, run batches, finish.

    inputs --prepare--> pieces --(batched across requests, sorted by size)--> run --> piece results --finish--> result

A ``Runner`` is one task on one loaded model. One input may need several pieces (windows of a long context, one per
candidate label, one per document); the engine batches pieces of any requests that share ``Piece.group``.
Lives in the worker. Torch-free, so that the engine's scheduling is tested without a model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slipstream_server.tasks.items import TaskInput, TaskResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A unit of model work. ``size`` is what padding costs (tokens for text); pieces of one ``group`` may share a
    forward pass. ``payload`` is the runner's own.
    """

    size: int
    payload: Any
    group: Hashable = None


class Runner(Protocol):
    """One task on one model. ``prepare`` and ``finish`` may run on a helper thread, ``run`` on the engine's; where
    passes of the model do not disturb each other, the engine may ``run`` parts of one batch on several threads at once.
    """

    def prepare(self, item: TaskInput, parameters: Mapping[str, Any]) -> Sequence[Piece]:
        """The pieces of one input; raises a SlipstreamError that fails this input alone."""

    def run(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        """One forward pass over pieces of one group (any requests'); a raw result each, off the device."""

    def finish(self, item: TaskInput, parameters: Mapping[str, Any], raw: Sequence[Any]) -> TaskResult:
        """The input's result from those of its pieces, in their order."""
