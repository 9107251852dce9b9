"""Packed linear layers: the same products, or none at all."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from tests.unit.engine.driving import Bench, generate_alone, prompts, request
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream_server.inference.engine import packing
from slipstream_server.inference.engine.packing import PackedLinear, pack_linears, side_by_side
from slipstream_server.inference.worker_process import UNLESS_SET


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
        torch.testing.assert_close(PackedLinear.of(linear)[0](inputs), linear(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_packed_together_give_the_plain_products_whatever_they_are_given(bias: bool) -> None:
    linears = [nn.Linear(40, width, bias=bias).eval() for width in (24, 8, 72)]
    packed = PackedLinear.of(*linears)
    once, other = torch.randn(1, 3, 40), torch.randn(1, 5, 40)
    with torch.inference_mode():
        # The same tensor for all, another one between them, one layer twice, and what a layer made changed in place.
        for layer, inputs in [
            (0, once),
            (1, once),
            (0, other),
            (2, once),
            (0, once),
            (0, once),
            (2, other),
            (1, other),
        ]:
            outputs = packed[layer](inputs)
            torch.testing.assert_close(outputs, linears[layer](inputs), rtol=1e-4, atol=1e-5)
            outputs.zero_()


@pytest.mark.parametrize("chosen", [(0, 1, 2), (0, 1), (1, 0, 2)])
def test_products_side_by_side_are_those_of_each_layer(chosen: tuple[int, ...]) -> None:
    linears = [nn.Linear(40, width).eval() for width in (24, 8, 72)]
    packed = PackedLinear.of(*linears)
    inputs = torch.randn(1, 3, 40)
    with torch.inference_mode():
        expected = torch.cat([linears[index](inputs) for index in chosen], dim=-1)
        found = side_by_side(*(packed[index] for index in chosen))(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        plain = side_by_side(*(linears[index] for index in chosen))(inputs)
        torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_are_given_alike_multiply_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = float32_model()
    with torch.inference_mode():
        expected = model(torch.arange(5)[None]).logits
    assert pack_linears(model, given_alike=True) == 2 * 7 + 1
    multiply = Mock(wraps=torch.ops.mkldnn._linear_pointwise)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", multiply)
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.arange(5)[None]).logits, expected, rtol=1e-4, atol=1e-4)
    assert multiply.call_count == 2 * 4 + 1


def test_layers_that_differ_in_kind_are_packed_alone() -> None:
    attention = float32_model().model.layers[0].self_attn
    attention.k_proj = nn.Linear(48, 24, bias=True)
    assert pack_linears(attention, given_alike=True) == 4
    assert len({layer._product for layer in attention.children()}) == 4


@pytest.mark.parametrize("given_alike", [True, False])
def test_a_packed_model_gives_the_same_answers(given_alike: bool) -> None:
    model = float32_model()
    packed = copy.deepcopy(model)
    assert pack_linears(packed, given_alike=given_alike) == 2 * 7 + 1
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


STEPS_OF_ALL_SIZES = """
import torch
from torch import nn
from slipstream_server.inference.engine.packing import PackedLinear

def own_mib():
    lines = (line.split() for line in open("/proc/self/status"))
    return sum(int(words[1]) for words in lines if words[0] in ("RssAnon:", "VmSwap:")) / 1024

torch.set_num_threads(1)
with torch.inference_mode():
    layers = [PackedLinear.of(nn.Linear(size, 64))[0] for size in (64, 128, 192, 256)]
    before = own_mib()
    for rows in range(1, 257):
        for layer in layers:
            layer(torch.zeros(rows, layer.in_features))
print(own_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_of_all_sizes_do_not_grow_a_worker() -> None:
    """With what a worker's environment says of the caches of compiled products, and with the libraries' own sizes."""
    kept = {name: value for name, value in os.environ.items() if name not in UNLESS_SET}

    def mib(environment: dict[str, str]) -> float:
        command = [sys.executable, "-c", STEPS_OF_ALL_SIZES]
        done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=240, check=True)
        return float(done.stdout)

    bounded, unbounded = mib(UNLESS_SET), mib({})
    assert bounded < 120 < unbounded, "products are kept otherwise than the bound was made for"
