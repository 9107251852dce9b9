"""Fused operations answer what the modules and functions they replace would."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.adapter_folders import peft_alone, save_adapter
from tests.unit.engine.continuous_driving import ContinuousBench, reference
from tests.unit.engine.decoders import build
from tests.unit.engine.driving import prompts, request
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PhiConfig, PretrainedConfig, Qwen3Config

from slipstream_server.inference.engine.fused_decoder import _FusedLayer
from slipstream_server.inference.engine.fusing import FusedGates, FusedLayers, FusedNorm
from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SIZES, head_dim=16)
# By hand: norms (two a layer, and the last one; with norms of queries and keys; with those behind each part) and gates.
COUNTS = [
    (LLAMA, 5 + 2),
    (Qwen3Config(**SIZES, head_dim=16), 9 + 2),
    (Gemma3TextConfig(**SIZES, head_dim=16), 13),
    (PhiConfig(**SIZES), 0),
]


def model_of(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def num_fused(model: Any, *kinds: type) -> int:
    """How many modules have a forward of these kinds in the place of their own."""
    return sum(isinstance(vars(module).get("forward"), kinds) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "count"), COUNTS, ids=lambda value: getattr(value, "model_type", None))
@torch.inference_mode()
def test_a_fused_model_answers_the_same(config: PretrainedConfig, count: int, dtype: torch.dtype) -> None:
    model = model_of(config, dtype)
    plain = copy.deepcopy(model)
    fused = FusedLayers(model)
    assert num_fused(model, FusedNorm, FusedGates) == count
    ids = torch.randint(0, 97, (1, 23))
    with fused.rotary():
        found = model(ids, use_cache=False).logits.float()
    expected = plain(ids, use_cache=False).logits.float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@torch.inference_mode()
def test_several_rows_and_other_dtypes_are_left_to_the_model() -> None:
    model = model_of(LLAMA, torch.float32)
    plain = copy.deepcopy(model)
    fused = FusedLayers(model)
    ids = torch.randint(0, 97, (3, 11))
    with fused.rotary():
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    norm, states = model.model.norm, torch.randn(2, 5, 64, dtype=torch.float64)
    torch.testing.assert_close(norm(states), plain.model.norm(states))


@torch.inference_mode()
def test_states_that_do_not_lie_together_are_read_where_they_are() -> None:
    model = model_of(LLAMA, torch.float32)
    plain = copy.deepcopy(model)
    fused = FusedLayers(model)
    source = sys.modules[type(model.model).__module__]
    whole = torch.randn(1, 7, 4 * 16 + 2 * 16 + 5)
    queries, keys = (whole[..., a:b].view(1, 7, -1, 16).transpose(1, 2) for a, b in ((0, 64), (64, 96)))
    cos, sin = plain.model.rotary_emb(whole, torch.arange(7)[None])
    expected = source.apply_rotary_pos_emb(queries, keys, cos, sin)
    with fused.rotary():
        found = source.apply_rotary_pos_emb(queries, keys, cos, sin)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.model.norm(whole[..., 2:66]), plain.model.norm(whole[..., 2:66]))


@torch.inference_mode()
def test_the_models_source_is_as_it_was_afterwards() -> None:
    model = model_of(LLAMA, torch.float32)
    source = sys.modules[type(model.model).__module__]
    original = source.apply_rotary_pos_emb
    fused = FusedLayers(model)
    with pytest.raises(KeyError), fused.rotary():
        assert source.apply_rotary_pos_emb is not original
        raise KeyError
    assert source.apply_rotary_pos_emb is original


@torch.inference_mode()
def test_float64_is_not_fused() -> None:
    model = model_of(LLAMA, torch.float64)
    FusedLayers(model)
    assert num_fused(model, FusedNorm, FusedGates) == 0


@torch.inference_mode()
def test_a_layer_that_only_looks_like_one_is_left_alone() -> None:
    model = model_of(LLAMA, torch.float32)
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    model.model.norm.forward = lambda states: states * 2
    FusedLayers(model)
    assert num_fused(model, FusedNorm, FusedGates) == 5 + 2 - 2


@torch.inference_mode()
def test_what_is_no_number_stays_none() -> None:
    model = model_of(LLAMA, torch.bfloat16)
    FusedLayers(model)
    states = torch.ones(1, 2, 64, dtype=torch.bfloat16)
    states[0, 1, 3] = torch.nan
    found = model.model.norm(states)
    assert bool(found[0, 0].isfinite().all())
    assert bool(found[0, 1].isnan().all())


def test_adapters_change_the_layers_that_run_as_one(tmp_path: Path) -> None:
    """Steps with an adapter, and steps after it without one, in float32, where layers are fused."""
    model = PackedModel(Traits.of(build("llama", torch.float32)))
    assert num_fused(model.traits.model, _FusedLayer) == 2
    slots = LoraSlots(model.traits.model, num_slots=2, max_rank=8)
    every = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    adapter = save_adapter(reference("llama", torch.float32), tmp_path / "1", seed=3, rank=4, targets=every)
    bench = ContinuousBench(model, 30, slots=slots, max_step_tokens=80)
    prompt = prompts([40])[0]
    answers = bench.run(request(prompt, 6, adapter=adapter), request(prompt, 12))
    alone = [
        peft_alone(reference("llama", torch.float32), pin, prompt, max_new_tokens=length)
        for pin, length in ((adapter, 6), (None, 12))
    ]
    assert [answer.tokens[0] for answer in answers] == alone
    assert alone[0] != alone[1][:6]
