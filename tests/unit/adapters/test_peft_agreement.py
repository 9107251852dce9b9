"""What PEFT itself saves is accepted, and found to be what PEFT says it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from slipstream_server.adapters import configuration
from slipstream_server.adapters.compatibility import compatible
from slipstream_server.adapters.inspection import inspect
from slipstream_server.models.safetensors_header import read_header

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("changes", "num_extra"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 0),
        ({"target_modules": "all-linear"}, 0),
        ({"target_modules": ["q_proj"], "use_dora": True}, 0),
        ({"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}}, 0),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 0),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 1),
    ],
)
def test_adapters_of_peft_are_accepted(tmp_path: Path, changes: dict[str, object], num_extra: int) -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **changes))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    parsed = configuration.parse((tmp_path / "adapter" / configuration.FILE).read_bytes())
    facts = inspect(parsed, read_header(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert facts.num_parameters == trainable
    assert len(facts.saved_whole) == num_extra
    compatible(facts, read_header(tmp_path / "base" / "model.safetensors"))
    # The canonical configuration, in place of PEFT's own, gives the same model.
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
    (tmp_path / "adapter" / configuration.FILE).write_bytes(configuration.canonical_bytes(facts.configuration))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, expected)
