"""A linear layer with room for the low-rank updates of several adapters, each row of a batch with its own.

    outputs[r] = layer(inputs[r]) + inputs[r] @ down[slot of r] @ up[slot of r]

The layer itself stays where it is, packed, quantized or plain, its weights tied or not: only its ``forward`` is
replaced while a batch with adapters runs, and put back afterwards. Slot 0 is zeros: the base. Shapes: R rows, T tokens
of each, I inputs, O outputs, K rank (that of the largest adapter held; smaller ones are padded with zeros), S slots.
Engine thread, under inference_mode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from slipstream_server.inference.engine.adapter_files import Factors
from slipstream_server.inference.engine.transfers import to_device

BASE_SLOT = 0
# A gathered copy of the factors per row pays for the rows of decoding; the many tokens of prompts go slot by slot.
_MOST_ROWS_GATHERED = 64


class SlotIndex:
    """The slot of each row of some rectangle. ``only`` is set where all rows use the same one."""

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots
        self.only = slots[0] if len(set(slots)) == 1 else None
        self._indices: dict[torch.device, torch.Tensor] = {}
        self._members: dict[tuple[int, torch.device], torch.Tensor] = {}

    def index(self, device: torch.device) -> torch.Tensor:
        """The slots as a tensor ``[R]`` on ``device``."""
        if device not in self._indices:
            self._indices[device] = to_device(np.array(self.slots), device)
        return self._indices[device]

    def members(self, device: torch.device) -> list[tuple[int, torch.Tensor]]:
        """Every slot in use but the base's, and the rows that use it."""
        found = []
        for slot in sorted(set(self.slots) - {BASE_SLOT}):
            key = (slot, device)
            if key not in self._members:
                self._members[key] = (self.index(device) == slot).nonzero()[:, 0]
            found.append((slot, self._members[key]))
        return found


class Selection:
    """Whose rows run in this forward. ``kept``: those that are left behind the last layer but one, where only some
    positions have logits.
    """

    def __init__(self) -> None:
        self.is_active = False
        self._all = SlotIndex(())
        self._kept = SlotIndex(())

    @property
    def slots(self) -> tuple[int, ...]:
        return self._all.slots

    def choose(self, slots: tuple[int, ...], kept: tuple[int, ...]) -> None:
        if slots != self._all.slots:
            self._all = SlotIndex(slots)
        if kept != self._kept.slots:
            self._kept = SlotIndex(kept)

    def of(self, num_tokens: int) -> SlotIndex:
        """The slots of a layer's input of so many tokens."""
        return self._kept if num_tokens < len(self._all.slots) else self._all


class AdaptedLinear:
    """One layer, its stacks of factors, and the forward that adds them."""

    def __init__(
        self, layer: nn.Module, shape: tuple[int, int], selection: Selection, num_slots: int, dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self._layer = layer
        self._selection = selection
        self._num_slots = num_slots
        self._dtype = dtype
        self._plain: Any = None
        self._had_own_forward = False
        self._down_SIK: torch.Tensor | None = None
        self._up_SKO: torch.Tensor | None = None

    def put(self, slot: int, factors: Factors) -> None:
        """Fill an empty slot. Nothing is changed where memory does not suffice."""
        down_SIK, up_SKO = self._with_room_for(factors)
        down_SIK[slot, :, : factors.rank].copy_(factors.down.T)
        up_SKO[slot, : factors.rank].copy_(factors.up.T)
        self._down_SIK, self._up_SKO = down_SIK, up_SKO

    def clear(self, slot: int) -> None:
        """Make the slot what the base is."""
        if self._down_SIK is not None and self._up_SKO is not None:
            self._down_SIK[slot].zero_()
            self._up_SKO[slot].zero_()

    def install(self) -> None:
        """Add the selected rows' updates from now on."""
        if self._plain is None:
            self._had_own_forward = "forward" in vars(self._layer)
            self._plain = self._layer.forward
            self._layer.forward = self._forward

    def uninstall(self) -> None:
        """The layer is again what it was."""
        if self._plain is None:
            return
        if self._had_own_forward:
            self._layer.forward = self._plain
        else:
            del self._layer.forward
        self._plain = None

    def _forward(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        outputs: torch.Tensor = self._plain(inputs, *args, **kwargs)
        if not self._selection.is_active or self._down_SIK is None or self._up_SKO is None:
            return outputs
        if not inputs.numel():  # a step that wants no logits, at the last layer
            return outputs
        return self._added(outputs, inputs, self._down_SIK, self._up_SKO)

    def _added(
        self, outputs: torch.Tensor, inputs: torch.Tensor, down_SIK: torch.Tensor, up_SKO: torch.Tensor
    ) -> torch.Tensor:
        num_tokens = inputs.numel() // inputs.shape[-1]
        chosen = self._selection.of(num_tokens)
        # Some models flatten rows and tokens into one dimension, rows first.
        inputs_RTI = inputs.reshape(len(chosen.slots), -1, inputs.shape[-1]).to(self._dtype)
        sums_RTO = outputs.reshape(len(chosen.slots), -1, outputs.shape[-1]).to(self._dtype)
        if (slot := chosen.only) is not None:
            updated = torch.addmm(sums_RTO.flatten(0, 1), inputs_RTI.flatten(0, 1) @ down_SIK[slot], up_SKO[slot])
        elif len(chosen.slots) <= _MOST_ROWS_GATHERED:
            index_R = chosen.index(inputs.device)
            lowered_RTK = torch.bmm(inputs_RTI, down_SIK.index_select(0, index_R))
            updated = torch.baddbmm(sums_RTO, lowered_RTK, up_SKO.index_select(0, index_R))
        else:
            updated = sums_RTO.clone() if sums_RTO.data_ptr() == outputs.data_ptr() else sums_RTO
            for slot, rows in chosen.members(inputs.device):
                updated.index_add_(0, rows, inputs_RTI.index_select(0, rows) @ down_SIK[slot] @ up_SKO[slot])
        return updated.reshape(outputs.shape).to(outputs.dtype)

    def _with_room_for(self, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        old_down, old_up = self._down_SIK, self._up_SKO
        held = 0 if old_down is None else old_down.shape[2]
        if old_down is not None and old_up is not None and held >= factors.rank:
            return old_down, old_up
        inputs, outputs = factors.shape
        device = next(self._layer.parameters()).device
        down_SIK = torch.zeros((self._num_slots, inputs, factors.rank), dtype=self._dtype, device=device)
        up_SKO = torch.zeros((self._num_slots, factors.rank, outputs), dtype=self._dtype, device=device)
        if old_down is not None and old_up is not None:
            down_SIK[:, :, :held].copy_(old_down)
            up_SKO[:, :held].copy_(old_up)
        return down_SIK, up_SKO


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer of any make; None for anything else."""
    if (inputs := getattr(module, "in_features", None)) is not None:
        outputs = getattr(module, "out_features", None)
    else:  # transformers' Conv1D
        inputs, outputs = getattr(module, "nx", None), getattr(module, "nf", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None
