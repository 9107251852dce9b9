"""One forward of a decoder-only model over the tokens of many sequences, packed into one row without padding.

Decides at load whether a model can be run like this at all: it is run both ways and must answer the same.
Engine thread, under inference_mode. Shapes: N tokens of the step, M wanted positions among them, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slipstream_server.inference.engine.adapters import AdapterSlots
from slipstream_server.inference.engine.continuous_scheduler import Chunk
from slipstream_server.inference.engine.decode_graphs import DecodeGraphs, Record
from slipstream_server.inference.engine.faults import is_fatal, is_out_of_memory
from slipstream_server.inference.engine.gpu_memory import GpuMemory, new_gpu_memory
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS
from slipstream_server.inference.engine.paged_attention import (
    ATTENTION,
    CpuMemory,
    KVMemory,
    Layout,
    ShapeProbe,
    UnsupportedAttention,
    cpu_item_dtype,
    seat,
)
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.engine.sequences import blocks_for
from slipstream_server.inference.engine.transfers import on_device, to_device

if TYPE_CHECKING:
    from slipstream_server.inference.engine.fused_decoder import FusedDecoder

logger = logging.getLogger(__name__)

_PROBE_TOKENS = BLOCK_TOKENS + 5
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.1
_LAYER_KINDS = {"full_attention", "sliding_attention"}


class PackedModel:
    """A model that attends from blocks."""

    def __init__(self, traits: Traits) -> None:
        """Raises UnsupportedAttention, saying why, where the model has to be run otherwise."""
        self.traits = traits
        self._model = traits.model
        self._own_attention = self._model.config._attn_implementation
        if traits.is_encoder_decoder or not traits.takes_position_ids:
            raise UnsupportedAttention("a forward without position_ids")
        if not self._model._can_set_attn_implementation():
            raise UnsupportedAttention("attention that does not go through AttentionInterface")
        # The last states of a model on several devices are on another one than the index.
        is_on_one = len({parameter.device for parameter in self._model.parameters()}) == 1
        self._takes_logits_to_keep = traits.takes_logits_to_keep and is_on_one
        self._rotary: Callable[[], AbstractContextManager[None]] = nullcontext
        self._decoder: FusedDecoder | None = None
        probe = self._probe()
        layers = range(len(probe.shapes))
        self._shapes = [probe.shapes[layer] for layer in layers]
        self._devices = [probe.devices[layer] for layer in layers]
        self._check_rules(probe)
        expected_TV = self._expected()
        if self._is_on_cpu:
            with _said_as("fused layers"):
                self._fuse(probe)
        with _said_as("a forward from blocks"), self._fused(as_one=True):
            self._check(expected_TV)

    def _fuse(self, probe: ShapeProbe) -> None:
        # Compilers take a second to import, and a GPU does without.
        from slipstream_server.inference.engine.fused_decoder import FusedDecoder
        from slipstream_server.inference.engine.fusing import FusedLayers

        self._rotary = FusedLayers(self._model).rotary
        self._decoder = FusedDecoder(self._model, probe)

    @contextlib.contextmanager
    def _fused(self, as_one: bool) -> Iterator[None]:
        """Within it the model runs fused; ``as_one``: whole layers, where they are known."""
        with self._rotary():
            if self._decoder is not None:
                self._decoder.is_on = as_one
            try:
                yield
            finally:
                if self._decoder is not None:
                    self._decoder.is_on = False

    @property
    def block_bytes(self) -> int:
        """What one block takes in all layers together."""
        return sum(self.block_bytes_by_device.values())

    @property
    def block_bytes_by_device(self) -> Counter[torch.device]:
        """What one block takes on each device that has layers."""
        found: Counter[torch.device] = Counter()
        for shape, device in zip(self._shapes, self._devices, strict=True):
            found[device] += shape.block_bytes(self._item_dtype.itemsize)
        return found

    def use(self, num_blocks: int) -> None:
        """Attend from a KV memory of so many blocks from now on."""
        self._graphs: DecodeGraphs | None = None
        self._memory = self._new_memory(num_blocks)
        seat(self._model, self._memory)
        self._model.set_attn_implementation(ATTENTION)

    @torch.inference_mode()
    def record_decoding(
        self, record: Record, max_rows: int, report: Callable[[float], None] = lambda done: None
    ) -> bool:
        """Record decoding steps of up to so many rows, which ``run`` replays from now on where no adapter is wanted.
        False, and steps run as before, where the memory's kernels or the model cannot be recorded.
        """
        memory = self._memory
        if not isinstance(memory, GpuMemory) or memory.device is None or not memory.is_recordable:
            return False
        most_tokens = min(self.traits.context_tokens or sys.maxsize, memory.num_blocks * BLOCK_TOKENS)
        graphs = DecodeGraphs(
            lambda ids_1R, positions_1R: self._logits(ids_1R, positions_1R).float(),
            memory,
            max_rows=max_rows,
            table_blocks=blocks_for(most_tokens),
        )
        try:
            graphs.record(record, report)
        except Exception as error:
            logger.warning("decoding steps are not recorded, and slower so: %s", error)
            return False
        self._graphs = graphs
        return True

    @contextlib.contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Within it the model attends as it was loaded, with masks and cache objects."""
        self._model.set_attn_implementation(self._own_attention)
        try:
            yield
        finally:
            self._model.set_attn_implementation(ATTENTION)

    def run(self, chunks: Sequence[Chunk], slots: AdapterSlots) -> torch.Tensor:
        """Logits ``[M, V]`` in float32 of what the chunks want, in their order: see ``num_wanted``."""
        token_ids = np.concatenate([_tokens(chunk) for chunk in chunks])
        return self._run(chunks, torch.from_numpy(token_ids), [num_wanted(chunk) for chunk in chunks], slots)

    def run_ahead(self, chunks: Sequence[Chunk], ids_R: torch.Tensor, slots: AdapterSlots) -> torch.Tensor:
        """Logits ``[R, V]`` in float32 after one further token of each chunk's sequence, which is still on its way to
        the host. Overwritten by the next run of the model.
        """
        return self._run([Chunk(c.sequence, c.sequence.num_tokens, 1) for c in chunks], ids_R, [1] * len(chunks), slots)

    def _run(
        self, chunks: Sequence[Chunk], ids_N: torch.Tensor, nums_wanted: list[int], slots: AdapterSlots
    ) -> torch.Tensor:
        layout = _layout(chunks)
        rows = [chunk.sequence.row for chunk in chunks]
        # Adapters are on the modules of a layer.
        as_one = all(row.request.adapter is None for row in rows)
        only_decode = as_one and len(ids_N) == len(chunks) == sum(nums_wanted)
        if self._graphs is not None and only_decode and self._graphs.fits(layout):
            return self._graphs.run(ids_N, layout)
        wanted = np.concatenate(
            [np.arange(end - number, end) for number, end in zip(nums_wanted, layout.starts[1:], strict=True)]
        )
        self._memory.lay_out(layout)
        with slots.applied(rows, [chunk.num_tokens for chunk in chunks], wanted.tolist()), self._fused(as_one):
            return self._forward(ids_N, layout.positions_N, wanted)

    @property
    def _item_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return cpu_item_dtype(dtype) if self._is_on_cpu else dtype

    @property
    def _is_on_cpu(self) -> bool:
        return all(device.type == "cpu" for device in self._devices)

    def _new_memory(self, num_blocks: int) -> KVMemory:
        if self._is_on_cpu and CpuMemory.fits(self._shapes):
            return CpuMemory(self._shapes, num_blocks, self._model.dtype)
        return new_gpu_memory(self._shapes, num_blocks, self._item_dtype, self._devices)

    def _forward(self, ids_N: torch.Tensor, positions: Any, wanted: Any) -> torch.Tensor:
        device = self.traits.device
        logits_MV = self._logits(
            on_device(ids_N, device)[None],
            to_device(positions.astype(np.int64), device)[None],
            to_device(wanted, device),
        )
        return logits_MV.to(device=device, dtype=torch.float32, copy=True)

    def _logits(
        self,
        ids_1N: torch.Tensor,
        positions_1N: torch.Tensor,
        index_M: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The model's own logits: those of all positions, or of those that are wanted."""
        is_taken = index_M is not None and self._takes_logits_to_keep
        extra = {"logits_to_keep": index_M} if is_taken else {}
        output = self._model(input_ids=ids_1N, position_ids=positions_1N, use_cache=False, return_dict=True, **extra)
        logits_MV: torch.Tensor = output.logits[0]
        if index_M is not None and not is_taken:
            logits_MV = logits_MV.index_select(0, index_M.to(logits_MV.device))
        return logits_MV

    @torch.inference_mode()
    def _probe(self) -> ShapeProbe:
        probe = ShapeProbe()
        seats = seat(self._model, probe)
        self._model.set_attn_implementation(ATTENTION)
        try:
            with _said_as("a forward without a cache"):
                self._forward(torch.zeros(2, dtype=torch.int64), np.arange(2), np.arange(2))
        finally:
            self._model.set_attn_implementation(self._own_attention)
        if not seats or sorted(probe.shapes) != list(range(len(probe.shapes))) or not probe.shapes:
            raise UnsupportedAttention("layers that are not all attention")
        return probe

    def _check_rules(self, probe: ShapeProbe) -> None:
        """Refuse what would show only behind more tokens than the probes have."""
        config = self._model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or []
        if unknown := sorted(set(kinds) - _LAYER_KINDS):
            raise UnsupportedAttention(f"layers of {', '.join(unknown)}")
        window = getattr(config, "sliding_window", None) or sys.maxsize
        if window >= (self.traits.context_tokens or sys.maxsize):
            return
        windows = [probe.rules[layer].window for layer in range(len(probe.rules))]
        sliding = [width for width, kind in zip(windows, kinds, strict=False) if kind == "sliding_attention"]
        if not all(sliding) if kinds else not any(windows):
            raise UnsupportedAttention("a sliding window that only its masks know of")

    @property
    def _probe_ids(self) -> Any:
        return (np.arange(_PROBE_TOKENS, dtype=np.int64) * 7 + 3) % self.traits.vocab_size

    @torch.inference_mode()
    def _expected(self) -> torch.Tensor:
        """Logits of the probe by the model as it was loaded."""
        ids = torch.from_numpy(self._probe_ids)[None].to(self.traits.device)
        logits_TV: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0].float()
        return logits_TV

    @torch.inference_mode()
    def _check(self, expected_TV: torch.Tensor) -> None:
        """Compare: a prompt over a block's end, in two sequences, in two chunks."""
        ids = self._probe_ids
        self.use(4)
        try:
            first, second = np.arange(BLOCK_TOKENS - 3), np.arange(BLOCK_TOKENS - 3, _PROBE_TOKENS)
            tables = np.array([[2, 0], [1, 3]], dtype=np.int32)
            for positions in (first, second):
                self._memory.lay_out(
                    Layout(
                        rows_N=np.repeat(np.arange(2, dtype=np.int32), len(positions)),
                        positions_N=np.tile(positions.astype(np.int32), 2),
                        tables_SB=tables,
                        starts=(0, len(positions), 2 * len(positions)),
                    )
                )
                found_NV = self._forward(
                    torch.from_numpy(np.tile(ids[positions], 2)), np.tile(positions, 2), np.arange(2 * len(positions))
                )
                self._compare(found_NV, expected_TV[positions].repeat(2, 1))
        finally:
            self._model.set_attn_implementation(self._own_attention)

    def _compare(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        scale = float(expected.abs().max()) + 1e-6
        difference = float((found - expected.to(found.device)).abs().max()) / scale
        if not difference <= _TOLERANCE.get(self._model.dtype, _COARSE_TOLERANCE):
            raise UnsupportedAttention(f"answers that differ by {difference:.2g} when it is run from blocks")


@contextlib.contextmanager
def _said_as(what: str) -> Iterator[None]:
    """Whatever fails within it, but for want of memory or a lost device, is UnsupportedAttention, with its name."""
    try:
        yield
    except UnsupportedAttention:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_fatal(error):
            raise
        logger.warning("the model cannot run %s: %s", what, error, exc_info=error)
        raise UnsupportedAttention(f"{what} ({type(error).__name__})") from error


def num_wanted(chunk: Chunk) -> int:
    """How many of the chunk's positions, counted from its end, have logits that somebody reads."""
    if chunk.sequence.wants_prompt_logits:
        return chunk.count
    return 1 + len(chunk.drafts) if chunk.gives_token else 0


def _tokens(chunk: Chunk) -> Any:
    tokens = chunk.sequence.row.tokens[chunk.start : chunk.start + chunk.count]
    return np.concatenate([tokens, np.array(chunk.drafts, dtype=np.int64)]) if chunk.drafts else tokens


def _layout(chunks: Sequence[Chunk]) -> Layout:
    counts = [chunk.num_tokens for chunk in chunks]
    starts = np.concatenate([[0], np.cumsum(counts)])
    first_positions = np.array([chunk.start for chunk in chunks])
    rows_N = np.repeat(np.arange(len(chunks), dtype=np.int32), counts)
    positions_N = np.arange(starts[-1]) - starts[rows_N] + first_positions[rows_N]
    tables_SB = np.zeros((len(chunks), max(len(chunk.sequence.blocks) for chunk in chunks)), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        tables_SB[row, : len(chunk.sequence.blocks)] = chunk.sequence.blocks
    return Layout(
        rows_N=rows_N,
        positions_N=positions_N.astype(np.int32),
        tables_SB=tables_SB,
        starts=tuple(int(start) for start in starts),
    )
