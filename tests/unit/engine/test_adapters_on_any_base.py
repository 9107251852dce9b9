"""Adapters over layers that are not plain: packed, quantized, tied. A batch answers as PeftModel does on the same base.

Here the arithmetic is float32 or less, so that answers may part at near-ties: where the reference's two best scores are
as good as equal.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.unit.engine.adapter_folders import save_adapter
from tests.unit.engine.driving import Bench, prompts, request, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from slipstream_server.inference.engine.lora_slots import LoraSlots
from slipstream_server.inference.engine.packing import PackedLinear, pack_linears
from slipstream_server.inference.generation import AdapterPin

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**config: Any) -> Any:
    """Wide enough for the kernels of quantized layers, which work in blocks of 32."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 211, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, **config)).eval()


def mixed(model: Any, adapters: Sequence[AdapterPin | None], new_tokens: int = 8) -> dict[AdapterPin | None, list[int]]:
    bench = Bench(model, slots=LoraSlots(model, num_slots=4, max_rank=16))
    asked = [request(prompts([9])[0], new_tokens, adapter=adapter) for adapter in adapters]
    return {each.adapter: answer.tokens[0] for each, answer in zip(asked, bench.run(*asked), strict=True)}


def assert_equal_but_for_near_ties(model: Any, tokens: Sequence[int], near: float) -> None:
    """Each token is the reference's best after the ones before it, or as good as that."""
    prompt = prompts([9])[0]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    gaps = logits.max(dim=1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert float(gaps.max()) <= near, gaps.tolist()


def test_packed_layers(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model("llama")).float()
    adapters = [save_adapter(model, tmp_path / str(n), seed=n, targets=[*TARGETS, "lm_head"]) for n in (1, 2)]
    references = [PeftModel.from_pretrained(copy.deepcopy(model), each.folder).eval() for each in adapters]
    plain = copy.deepcopy(model)
    if not pack_linears(model, given_alike=True):
        pytest.skip("no packed layers on this machine")
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), PackedLinear)
    answers = mixed(model, [*adapters, None])
    for adapter, reference in zip([*adapters, None], [*references, plain], strict=True):
        assert_equal_but_for_near_ties(reference, answers[adapter], near=1e-4)
    assert len({tuple(tokens) for tokens in answers.values()}) == 3


def test_a_head_that_is_tied_to_the_embeddings_leaves_them_alone(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True).double()
    adapter = save_adapter(model, tmp_path / "1", seed=1, targets=["q_proj", "lm_head"])
    before = model.get_input_embeddings().weight.clone()
    answers = mixed(model, [adapter, None])
    reference = PeftModel.from_pretrained(copy.deepcopy(model), adapter.folder).eval()
    assert_equal_but_for_near_ties(reference, answers[adapter], near=0.0)
    assert_equal_but_for_near_ties(model, answers[None], near=0.0)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_bases(tmp_path: Path, bits: int) -> None:
    """PeftModel over the same quantized weights. 8-bit rounds a row's inputs, so that near is wider there."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
        ).eval()

    model = load()
    adapter = save_adapter(base, tmp_path / "1", seed=1, targets=TARGETS)
    answers = mixed(model, [adapter, None])
    assert_equal_but_for_near_ties(
        PeftModel.from_pretrained(load(), adapter.folder).eval(), answers[adapter], near=0.05
    )
    assert_equal_but_for_near_ties(load(), answers[None], near=0.05)
    assert answers[adapter] != answers[None]
