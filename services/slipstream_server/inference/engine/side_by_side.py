"""A batch of texts as several smaller ones at once, each on a core of its own.

Threads that share one forward pass meet after each of its many short operations: all wait for the slowest, and for
what only one can do. Passes side by side meet once, at the end. A batch that is too small for that, or is one long
text, is run by all threads together as before. On a CPU alone, and for models and runners whose passes change nothing
that another one reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import accumulate, pairwise
from typing import Any

import torch

from slipstream_server.tasks.runner import Piece, Runner

# Below it a pass is mostly Python, which runs one at a time.
_LEAST_TOKENS = 128
# The types of models whose forward writes nothing into its modules; others keep a batch's length or masks there.
_UNCHANGING = {
    "albert", "bart", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "eurobert", "gemma3_text", "gte", "jina_embeddings_v3", "llama", "longformer", "mistral", "mobilebert",
    "modernbert", "mpnet", "nomic_bert", "qwen2", "qwen3", "rembert", "roberta", "squeezebert", "t5", "xlm-roberta",
    "xlm-roberta-xl",
}  # fmt: skip
# Rotary frequencies that are made anew for the length of a batch.
_CHANGING_ROTARY = ("dynamic", "longrope")
# It is written by the model's ``generate``, which does as it likes.
_WRITING_TASK = "table-question-answering"


def may_run_side_by_side(model: Any, task_ids: Sequence[str]) -> bool:
    """Whether passes of these tasks on a loaded model do not disturb each other."""
    if _WRITING_TASK in task_ids or model.config.model_type not in _UNCHANGING:
        return False
    rotary = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    return not any(word in rope_type for word in _CHANGING_ROTARY for rope_type in rotary)


def run_together(runner: Runner, pieces: Sequence[Piece]) -> Sequence[Any]:
    """One pass, under inference mode."""
    with torch.inference_mode():
        return runner.run(pieces)


class SideBySide:
    """Runs batches on as many threads as the caller's thread has for one operation."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def run(self, runner: Runner, pieces: Sequence[Piece]) -> Sequence[Any]:
        """A raw result for each piece, in their order; raises what the first part to fail raised, when all are done."""
        # Asked first: a thread that has not computed yet would take the number that was set last, by whichever thread.
        num_cores = torch.get_num_threads()
        if num_cores == 1 or len(pieces) == 1 or sum(piece.size for piece in pieces) < _LEAST_TOKENS:
            return run_together(runner, pieces)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(num_cores, "core", initializer=torch.set_num_threads, initargs=(1,))
        passes = [self._pool.submit(run_together, runner, part) for part in _parts(pieces, num_cores)]
        wait(passes)
        return [result for each in passes for result in each.result()]


def _parts(pieces: Sequence[Piece], number: int) -> list[Sequence[Piece]]:
    """The pieces, which are in the order of their size, cut where each part has about as many tokens; none is empty."""
    sums = [0, *accumulate(piece.size for piece in pieces)]
    cuts = [_nearest(sums, sums[-1] * part / number) for part in range(1, number)]
    return [pieces[start:end] for start, end in pairwise([0, *cuts, len(pieces)]) if start < end]


def _nearest(sums: Sequence[int], wanted: float) -> int:
    """The place of the ascending sum that is nearest to the one wanted."""
    place = bisect_left(sums, wanted)
    return place - 1 if place and wanted - sums[place - 1] < sums[place] - wanted else place
