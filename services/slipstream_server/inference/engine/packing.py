"""Linear layers whose weights oneDNN has packed once: on a CPU the same products, 1.3 to 3 times as fast at the row
counts of decoding. Layers that are given the same tensor, such as queries, keys and values, have one packed weight
together: fewer and larger products, which divide better among the cores (1.1 times as fast again at 16 rows).

Rests on private operators of torch (torch.ops.mkldnn), so everything about them stands here: each packed layer is
checked against the plain product when it is made, and where they are missing or disagree the model stays as it was.
The plain weights stay too (adapters and ``generate`` read them), so packing costs the linears' memory once more.
Adapters wrap around packed layers like around any nn.Linear.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

logger = logging.getLogger(__name__)

_PACKED_FOR_ROWS = 16
_PROBE_ROWS = 4
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Layers of one module that decoder-only models give the same tensor, one after the other.
_GIVEN_ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Where a tensor that is multiplied keeps the products that its other layers have not asked for yet.
_PARTS = "_packed_products"


class PackedLinear(nn.Linear):
    """An nn.Linear that multiplies by its packed weight. Inference only: a change of ``weight`` is not seen."""

    _product: _Product

    @classmethod
    def of(cls, *linears: nn.Linear) -> list[PackedLinear]:
        """The same layers, sharing their parameters, with one packed weight for all of them. Right for whatever each is
        given; fast where they are given the same tensor.
        """
        layers = [cls._like(linear) for linear in linears]
        product = _Product(layers)
        for layer in layers:
            layer._product = product
        return layers

    @classmethod
    def _like(cls, linear: nn.Linear) -> PackedLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        parts: dict[PackedLinear, torch.Tensor] | None = getattr(inputs, _PARTS, None)
        part = parts.pop(self, None) if parts else None
        if part is None:
            if len(self._product.layers) == 1:
                return self._product.joint(inputs)
            parts = self._product(inputs)
            part = parts.pop(self)
            if parts:
                setattr(inputs, _PARTS, parts)
        return part


class _Product:
    """Multiplies one tensor by the weights of several layers."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        weight = (
            torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
        )
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        biases = [bias.detach() for layer in layers if (bias := layer._parameters.get("bias")) is not None]
        self._bias = torch.cat(biases) if biases else None

    def joint(self, inputs: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self._bias, "none", [], "")
        return product

    def __call__(self, inputs: torch.Tensor) -> dict[PackedLinear, torch.Tensor]:
        return dict(zip(self.layers, torch.split(self.joint(inputs), self._sizes, dim=-1), strict=True))


def side_by_side(*linears: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives the outputs of all these layers for one tensor, one beside the other; by one product where it can."""
    first = linears[0]
    if isinstance(first, PackedLinear) and first._product.layers == list(linears):
        return first._product.joint
    return lambda inputs: torch.cat([linear(inputs) for linear in linears], dim=-1)


@torch.inference_mode()
def pack_linears(model: Any, *, given_alike: bool = False) -> int:
    """Replace the model's linear layers by packed ones; how many. 0, and the model unchanged, where packing does not
    work here. ``given_alike``: it is a decoder-only model, whose projections of one module are given the same tensor.
    """
    names = _GIVEN_ALIKE if given_alike else ()
    groups = [(parent, group) for parent in model.modules() for group in _groups(parent, names)]
    try:
        packed = [(parent, dict(zip(group, _checked(*group.values()), strict=True))) for parent, group in groups]
    except Exception as error:
        logger.warning("linear layers stay unpacked: %s", error)
        return 0
    for parent, layers in packed:
        for name, layer in layers.items():
            setattr(parent, name, layer)
    return sum(len(layers) for _, layers in packed)


def packed_bytes(model: Any) -> int:
    """What the packed weights take beside the plain ones."""
    return sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, PackedLinear))


def _groups(parent: nn.Module, given_alike: Sequence[Sequence[str]]) -> list[dict[str, nn.Linear]]:
    """The linear layers that are children of ``parent``, those that can be multiplied together in one group."""
    linears = {name: child for name, child in parent.named_children() if _fits(child)}
    groups = []
    for names in given_alike:
        found = [linears[name] for name in names if name in linears]
        kinds = {(linear.in_features, linear.weight.dtype, linear.bias is None) for linear in found}
        if len(found) == len(names) and len(kinds) == 1:
            groups.append({name: linears.pop(name) for name in names})
    return [*groups, *({name: linear} for name, linear in linears.items())]


def _fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype in _TOLERANCE and weight.is_contiguous()


def _checked(*linears: nn.Linear) -> list[PackedLinear]:
    """The packed layers, after a comparison with the plain products on a few rows."""
    layers = PackedLinear.of(*linears)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE_ROWS, linears[0].in_features, generator=generator).to(linears[0].weight.dtype)
    for linear, packed in zip(linears, layers, strict=True):
        plain = linear(probe)
        scale = float(plain.abs().max()) + 1e-6
        difference = float((packed(probe) - plain).abs().max()) / scale
        if not difference <= _TOLERANCE[linear.weight.dtype]:
            raise ArithmeticError(f"packed and plain products differ by {difference:.2g}")
    return layers
