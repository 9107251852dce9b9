"""Packed linear layers: the same products, or none at all."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.unit.engine.driving import Bench, generate_alone, prompts, request
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream_server.inference.engine import packing
from slipstream_server.inference.engine.packing import PackedLinear, pack_linears


def float32_model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=211, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("rows", [1, 3, 16, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_the_plain_product(rows: int, bias: bool) -> None:
    linear = nn.Linear(40, 24, bias=bias).eval()
    inputs = torch.randn(2, rows, 40)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear.of(linear)(inputs), linear(inputs), rtol=1e-4, atol=1e-5)


def test_a_packed_model_gives_the_same_answers() -> None:
    model = float32_model()
    packed = copy.deepcopy(model)
    assert pack_linears(packed) == 2 * 7 + 1
    asked = prompts([4, 20, 9])
    answers = Bench(packed).run(*[request(prompt) for prompt in asked])
    assert [answer.tokens[0] for answer in answers] == [generate_alone(model, p, max_new_tokens=12) for p in asked]


def test_parameters_keep_their_names_and_values() -> None:
    model = float32_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack_linears(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_packing_that_disagrees_leaves_the_model_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = float32_model()
    monkeypatch.setattr(PackedLinear, "forward", lambda self, inputs: nn.Linear.forward(self, inputs) * 1.01)
    assert pack_linears(model) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert "differ by" in caplog.text


def test_float64_is_not_packed() -> None:
    assert pack_linears(float32_model().double()) == 0


def test_missing_operators_leave_the_model_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*args: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packing, "_checked", missing)
    assert pack_linears(float32_model()) == 0
    assert "stay unpacked" in caplog.text
