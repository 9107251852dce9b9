"""Linear layers whose weights oneDNN has packed once: on a CPU the same products, 1.3 to 3 times as fast at the row
counts of decoding.

Rests on private operators of torch (torch.ops.mkldnn), so everything about them stands here: each packed layer is
checked against the plain product when it is made, and where they are missing or disagree the model stays as it was.
The plain weights stay too (adapters and ``generate`` read them), so packing costs the linears' memory once more.
Adapters wrap around packed layers like around any nn.Linear.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_PACKED_FOR_ROWS = 16
_PROBE_ROWS = 4
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class PackedLinear(nn.Linear):
    """An nn.Linear that multiplies by its packed weight. Inference only: a change of ``weight`` is not seen."""

    _packed: torch.Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """The same layer, sharing its parameters."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        packed.in_features, packed.out_features = linear.in_features, linear.out_features
        packed.weight, packed.bias = linear.weight, linear.bias
        packed._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKED_FOR_ROWS)
        return packed.train(linear.training)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
        return result


@torch.inference_mode()
def pack_linears(model: Any) -> int:
    """Replace the model's linear layers by packed ones; how many. 0, and the model unchanged, where packing does not
    work here.
    """
    linears = [
        (parent, name, child) for parent in model.modules() for name, child in parent.named_children() if _fits(child)
    ]
    try:
        packed = [(parent, name, _checked(child)) for parent, name, child in linears]
    except Exception as error:
        logger.warning("linear layers stay unpacked: %s", error)
        return 0
    for parent, name, layer in packed:
        setattr(parent, name, layer)
    return len(packed)


def packed_bytes(model: Any) -> int:
    """What the packed weights take beside the plain ones."""
    return sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, PackedLinear))


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype in _TOLERANCE and weight.is_contiguous()


def _checked(linear: nn.Linear) -> PackedLinear:
    """The packed layer, after a comparison with the plain product on a few rows."""
    packed = PackedLinear.of(linear)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE_ROWS, linear.in_features, generator=generator).to(linear.weight.dtype)
    plain = linear(probe)
    scale = float(plain.abs().max()) + 1e-6
    difference = float((packed(probe) - plain).abs().max()) / scale
    if not difference <= _TOLERANCE[linear.weight.dtype]:
        raise ArithmeticError(f"packed and plain products differ by {difference:.2g}")
    return packed
