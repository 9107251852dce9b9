"""The forward of the step to come, begun as soon as its tokens are chosen and before the host has seen them.

    device   | forward n | choose n | forward n+1            | choose n+1 | forward n+2 ...
    host       begin n+1 ^            tokens n, events, plan ^ begin n+2

A row's next forward needs the token just chosen and its position, which the device and the host know; whether that
token ends the row is found out while the device is busy. Then the row's part of the forward was for nothing: its
logits are never asked for, and what it wrote lies behind the last token of blocks that are given back, and is
overwritten in the order of the device's stream. Engine thread. Shapes: A rows run ahead, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from slipstream_server.inference.engine.continuous_scheduler import Chunk
from slipstream_server.inference.engine.sequences import Sequence as KVSequence
from slipstream_server.inference.engine.transfers import to_device


class AheadLogits:
    """The logits ``[A, V]`` that follow the newest tokens of these sequences, until the step that wants them."""

    def __init__(self, sequences: Sequence[KVSequence], logits_AV: torch.Tensor) -> None:
        self._logits_AV = logits_AV
        # Whoever loses its blocks gets another list of them: keys and values in the old one are of no use to it.
        self._places = {sequence: (place, sequence.blocks) for place, sequence in enumerate(sequences)}

    def first(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks, those that need no forward before the others."""
        return sorted(chunks, key=lambda chunk: not self._has(chunk))

    def complete(self, chunks: Sequence[Chunk], run: Callable[[Sequence[Chunk]], torch.Tensor]) -> torch.Tensor:
        """The logits that the chunks, in the order of ``first``, want; those that are missing are run."""
        places = [self._places[chunk.sequence][0] for chunk in chunks if self._has(chunk)]
        if len(places) == len(chunks) and places == list(range(len(self._logits_AV))):
            return self._logits_AV
        # Copied first: the logits may be overwritten by the next run.
        known_AV = self._logits_AV.index_select(0, to_device(np.array(places, dtype=np.int64), self._logits_AV.device))
        return torch.cat([known_AV, run(others)]) if (others := chunks[len(places) :]) else known_AV

    def _has(self, chunk: Chunk) -> bool:
        _, blocks = self._places.get(chunk.sequence, (0, None))
        return blocks is chunk.sequence.blocks
