"""A whole decoder layer on a CPU in 10 calls where its modules make 60: norm, attention with rotary positions, norm,
gated feed-forward, with a residual around each half.

For the layers that are nothing else, known by their class: others have the same parts and do more with them, some of
it only at positions that no probe comes to. The modules stay in place for steps that adapters take part in, and for
whoever runs the model as it was loaded. Engine thread, under inference_mode. Shapes: N tokens, W width, H query heads,
K key heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch

from slipstream_server.inference.engine import fused_kernels
from slipstream_server.inference.engine.fusing import FusedGates, FusedNorm, rotates_halves
from slipstream_server.inference.engine.packing import side_by_side
from slipstream_server.inference.engine.paged_attention import SEAT, AttentionRule, CpuMemory, ShapeProbe, numpy_items

_KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}


class FusedDecoder:
    """The layers of one model, whose norms and gates are fused; ``is_on``: whether they run as one."""

    def __init__(self, model: Any, probe: ShapeProbe) -> None:
        self.is_on = False
        for module in model.modules():
            if _is_known(module):
                layer = module.self_attn.layer_idx
                module.forward = _FusedLayer(self, module, probe.shapes[layer].key_size, probe.rules[layer])


def _is_known(module: Any) -> bool:
    if type(module).__name__ not in _KNOWN or not type(module).__module__.startswith("transformers.models."):
        return False
    norms = (module.input_layernorm.forward, module.post_attention_layernorm.forward)
    return (
        all(isinstance(norm, FusedNorm) for norm in norms)
        and isinstance(module.mlp.forward, FusedGates)
        and rotates_halves(module.self_attn, norms[0].dtype)
    )


class _FusedLayer:
    def __init__(self, decoder: FusedDecoder, module: Any, size: int, rule: AttentionRule) -> None:
        attention = module.self_attn
        self._decoder = decoder
        self._original = module.forward
        self._attention, self._size, self._rule = attention, size, rule
        self._project = side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self._num_heads = attention.q_proj.out_features // size
        self._join = attention.o_proj
        self._first_norm: FusedNorm = module.input_layernorm.forward
        self._second_norm: FusedNorm = module.post_attention_layernorm.forward
        self._gates: FusedGates = module.mlp.forward

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        memory = getattr(self._attention, SEAT).memory
        if (
            not self._decoder.is_on
            or not isinstance(memory, CpuMemory)
            or position_embeddings is None
            or any(states.shape != (1, hidden_states.shape[1], self._size) for states in position_embeddings)
        ):
            return self._original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        attended = self._attend(memory, self._first_norm(hidden_states), *position_embeddings)
        sums, normed = self._second_norm.of_sum(hidden_states, self._join(attended))
        return sums + self._gates.unadapted(normed)

    def _attend(
        self, memory: CpuMemory, states_1NW: torch.Tensor, cos_1ND: torch.Tensor, sin_1ND: torch.Tensor
    ) -> torch.Tensor:
        """``[1, N, H * D]`` from normed states."""
        layer = getattr(self._attention, SEAT).layer
        rotated_NHD = torch.empty((states_1NW.shape[1], self._num_heads, self._size), dtype=torch.float32)
        fused_kernels.rotate_and_write(
            *(numpy_items(states[0]) for states in (self._project(states_1NW), cos_1ND, sin_1ND)),
            *memory.places(layer),
            numpy_items(rotated_NHD),
        )
        outputs_NHD = memory.attend_written(layer, rotated_NHD, self._rule)
        return outputs_NHD.flatten(1)[None].to(states_1NW.dtype)
