"""Replaces small operations of a decoder on a CPU by the fused kernels: norms, rotary positions, gated activations.

Nothing is known of model families here: what may be a norm or a gated layer by its parts is run on a probe both ways,
and replaced where the answers agree. Modules keep their names and weights, so adapters find what they look for.
Engine thread, under inference_mode. Shapes: N tokens, W width, H heads, D head size.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slipstream_server.inference.engine import fused_kernels
from slipstream_server.inference.engine.packing import side_by_side
from slipstream_server.inference.engine.paged_attention import numpy_items

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_PROBE_TOKENS = 3
_ROTARY = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj")

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class FusedLayers:
    """The fused operations of one model."""

    @torch.inference_mode()
    def __init__(self, model: Any) -> None:
        self._rotary: list[tuple[ModuleType, Rotary]] = []
        if model.dtype not in _TOLERANCE or any(p.device.type != "cpu" for p in model.parameters()):
            return
        for module in model.modules():
            replacement = _norm_for(module) or _gated_for(module, model.dtype)
            if replacement is not None:
                module.forward = replacement
        self._rotary = [
            (source, getattr(source, _ROTARY)) for source in _sources(model) if _rotates_halves(source, model.dtype)
        ]

    @contextlib.contextmanager
    def rotary(self) -> Iterator[None]:
        """Within it the model's rotary positions are fused: they are no module's, but a function of its source."""
        for source, original in self._rotary:
            setattr(source, _ROTARY, _fused_rotary(original))
        try:
            yield
        finally:
            for source, original in self._rotary:
                setattr(source, _ROTARY, original)


def _norm_for(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The fused forward of a root mean square norm, whose weight is a factor or what is added to 1."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        return None
    weight = parameters["weight"].detach()
    probe = _random(_PROBE_TOKENS, len(weight)).to(weight.dtype)
    for offset in (0.0, 1.0):
        fused = FusedNorm(module.forward, weight, eps, offset)
        if _agree(module.forward, fused, probe):
            return fused
    return None


class FusedNorm:
    """The forward of one norm."""

    def __init__(
        self, original: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, eps: float, offset: float
    ) -> None:
        self._original = original
        self.dtype = weight.dtype
        self._weight_W = numpy_items(weight)
        self._eps, self._offset = np.float32(eps), np.float32(offset)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if states.dtype != self.dtype:
            return self._original(states)
        states_NW = states.reshape(-1, states.shape[-1])
        outputs_NW = torch.empty_like(states_NW)
        fused_kernels.norm(numpy_items(states_NW), self._weight_W, self._eps, self._offset, numpy_items(outputs_NW))
        return outputs_NW.view(states.shape)

    def of_sum(self, states_1NW: torch.Tensor, added_1NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of contiguous states of the norm's dtype, and its norm."""
        sums_1NW, outputs_1NW = torch.empty_like(states_1NW), torch.empty_like(states_1NW)
        states_NW, added_NW, sums_NW, outputs_NW = (
            numpy_items(each[0]) for each in (states_1NW, added_1NW, sums_1NW, outputs_1NW)
        )
        fused_kernels.add_norm(states_NW, added_NW, self._weight_W, self._eps, self._offset, sums_NW, outputs_NW)
        return sums_1NW, outputs_1NW


def _gated_for(module: nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The fused forward of ``down(silu(gate(x)) * up(x))``."""
    names = [name for name, _ in module.named_children()]
    if names[:3] != list(_GATED) or len(names) > len(_GATED) + 1:
        return None
    width = getattr(module.gate_proj, "in_features", None)
    if not isinstance(width, int):
        return None
    fused = FusedGates(module, dtype)
    return fused if _agree(module.forward, fused, _random(1, _PROBE_TOKENS, width).to(dtype)) else None


class FusedGates:
    """The forward of one gated feed-forward."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._original: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self._gate, self._up, self._down = (getattr(module, name) for name in _GATED)
        self._both = side_by_side(self._gate, self._up)
        self._dtype = dtype

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if states.dtype != self._dtype or states.dim() != 3 or len(states) != 1:
            return self._original(states)
        gates_NW, ups_NW = self._gate(states)[0], self._up(states)[0]
        return self._times(
            gates_NW.shape, _flat_items(gates_NW), gates_NW.stride(0), _flat_items(ups_NW), ups_NW.stride(0)
        )

    def unadapted(self, states_1NW: torch.Tensor) -> torch.Tensor:
        """The same for contiguous states of the model's dtype, past whatever adapters add to gates and ups."""
        pairs_NP = numpy_items(self._both(states_1NW)[0])
        num_tokens, stride = pairs_NP.shape
        width, flat = stride // 2, pairs_NP.reshape(-1)
        return self._times((num_tokens, width), flat, stride, flat[width:], stride)

    def _times(self, shape: tuple[int, ...], *gates_and_ups: Any) -> torch.Tensor:
        """Down from silu(gates) * ups, which are given as to the kernel."""
        outputs_NW = torch.empty(shape, dtype=self._dtype)
        fused_kernels.silu_times(*gates_and_ups, numpy_items(outputs_NW))
        result: torch.Tensor = self._down(outputs_NW[None])
        return result


def rotates_halves(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the module's source has a function for rotary positions that the kernels know."""
    source = sys.modules[type(module).__module__]
    return callable(getattr(source, _ROTARY, None)) and _rotates_halves(source, dtype)


def _sources(model: Any) -> set[ModuleType]:
    """The source files of the model's modules that have a function for rotary positions."""
    found = {sys.modules[type(module).__module__] for module in model.modules()}
    return {source for source in found if callable(getattr(source, _ROTARY, None))}


def _rotates_halves(source: ModuleType, dtype: torch.dtype) -> bool:
    """Whether the function rotates queries and keys ``[1, H, N, D]`` as the kernel does."""
    original = getattr(source, _ROTARY)
    queries, keys = (_random(1, heads, _PROBE_TOKENS, 8).to(dtype) for heads in (4, 2))
    cos, sin = (_random(1, _PROBE_TOKENS, 8).to(dtype) for _ in range(2))
    return _agree(original, _fused_rotary(original), queries, keys, cos, sin)


def _fused_rotary(original: Rotary) -> Rotary:
    def rotary(
        queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = (queries, keys, cos, sin)
        is_plain = not args and not kwargs and cos.shape == sin.shape == (1, queries.shape[2], queries.shape[3])
        if not is_plain or any(state.dtype != queries.dtype or state.stride(-1) != 1 for state in states):
            return original(queries, keys, cos, sin, *args, **kwargs)
        cos_ND, sin_ND = numpy_items(cos[0].contiguous()), numpy_items(sin[0].contiguous())
        return _rotated(queries, cos_ND, sin_ND), _rotated(keys, cos_ND, sin_ND)

    return rotary


def _rotated(states: torch.Tensor, cos_ND: npt.NDArray[Any], sin_ND: npt.NDArray[Any]) -> torch.Tensor:
    """``[1, H, N, D]``, in memory by tokens."""
    _, num_heads, num_tokens, size = states.shape
    outputs_NHD = torch.empty((num_tokens, num_heads, size), dtype=states.dtype)
    fused_kernels.rotate(
        _flat_items(states), states.stride(2), states.stride(1), cos_ND, sin_ND, numpy_items(outputs_NHD)
    )
    return outputs_NHD.transpose(0, 1)[None]


def _flat_items(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The memory from a tensor's first item to its last."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return numpy_items(tensor.as_strided((length,), (1,)))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _agree(original: Callable[..., Any], fused: Callable[..., Any], *probe: torch.Tensor) -> bool:
    try:
        expected, found = original(*probe), fused(*probe)
    except Exception as error:  # what takes other arguments, or does not add up, is something else
        name = getattr(original, "__qualname__", original)
        logger.debug("%s stays as it is: %s: %s", name, type(error).__name__, error)
        return False
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    return all(
        isinstance(one, torch.Tensor)
        and one.shape == other.shape
        and one.dtype == other.dtype
        and one.dtype in _TOLERANCE
        and float((one.float() - other.float()).abs().max()) <= _TOLERANCE[one.dtype] * float(one.float().abs().max())
        for one, other in pairs
    )
