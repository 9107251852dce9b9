"""Configurations against the classes they are for; the classes' own rules are the second source."""

from __future__ import annotations

import math
from typing import Any

import pytest

from slipstream_server.errors import InvalidField, UnsafeWeights
from slipstream_server.models.config_checks import check_values, check_vocabulary
from slipstream_server.models.examine import examine

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"] * 4}


def examined(
    overrides: dict[str, Any], config: dict[str, Any] = LLAMA, *, is_whole: bool = False, auto_class: str = ""
) -> dict[str, Any]:
    request = {"config": config, "overrides": overrides, "is_whole": is_whole, "auto_class": auto_class}
    return examine(request)


def test_numbers_of_a_struct_become_what_the_class_wants() -> None:
    config = examined({"num_hidden_layers": 2.0, "rms_norm_eps": 1.0, "eos_token_id": [1.0, 2.0]})["config"]
    assert (config["num_hidden_layers"], config["eos_token_id"]) == (2, [1, 2])
    assert isinstance(config["num_hidden_layers"], int)
    assert isinstance(config["rms_norm_eps"], float)


def test_more_heads_of_the_same_width_are_narrower() -> None:
    config = examined({"num_attention_heads": 8.0, "num_key_value_heads": 4.0})["config"]
    assert config["head_dim"] == 8


def test_fewer_layers_have_fewer_layer_types() -> None:
    assert examined({"num_hidden_layers": 2.0}, QWEN)["config"]["layer_types"] == ["full_attention"] * 2


def test_another_spelling_of_a_field_is_the_same_field() -> None:
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_head": 4, "n_layer": 2}
    assert examined({"hidden_size": 32.0}, gpt2)["config"]["n_embd"] == 32


def test_an_activation_function_must_be_one_that_transformers_has() -> None:
    from transformers.activations import ACT2FN

    for name in ACT2FN:
        assert examined({"hidden_act": name})["config"]["hidden_act"] == name
    picture = {"model_type": "clip", "architectures": ["CLIPModel"]}
    for overrides, config, place in (
        ({"hidden_act": "swiglu_of_mine"}, LLAMA, "hidden_act"),
        (
            {"activation_function": "gelu_newer"},
            {"model_type": "gpt2", "architectures": ["GPT2Model"]},
            "activation_function",
        ),
        ({"text_config": {"hidden_act": "nonsense"}}, picture, "text_config.hidden_act"),
    ):
        with pytest.raises(InvalidField, match="is no activation function") as refused:
            examined(overrides, config)
        assert refused.value.violations[0].field == f"config_overrides.{place}"


def test_rotations_that_transformers_has_are_taken() -> None:
    found = examined({"rope_scaling": {"rope_type": "linear", "factor": 2.0}})["config"]
    assert (found["rope_parameters"]["rope_type"], found["rope_parameters"]["factor"]) == ("linear", 2.0)


def test_a_number_of_labels_names_them() -> None:
    found = examined({"num_labels": 3.0}, auto_class="AutoModelForSequenceClassification")
    assert found["architecture"] == "LlamaForSequenceClassification"
    assert list(found["config"]["id2label"].values()) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_heads_of_a_width_of_their_own_need_no_divisible_hidden_size() -> None:
    gemma = {"model_type": "gemma", "hidden_size": 50, "num_attention_heads": 4}
    assert examined({}, gemma, is_whole=True, auto_class="AutoModelForCausalLM")["config"]["head_dim"] == 256


@pytest.mark.parametrize(
    ("overrides", "place", "words"),
    [
        ({"num_attention_head": 8}, "num_attention_head", "did you mean 'num_attention_heads'"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size", r"64 is not a multiple .* \(5\)"),
        ({"num_key_value_heads": 3}, "num_attention_heads", r"4 is not a multiple of num_key_value_heads \(3\)"),
        ({"hidden_size": -1}, "hidden_size", "from 1 to"),
        ({"hidden_size": 2.5}, "hidden_size", "expected int"),
        ({"hidden_size": "wide"}, "hidden_size", "expected int"),
        ({"num_hidden_layers": 1e9}, "num_hidden_layers", "from 1 to 2048"),
        ({"vocab_size": 2.0**63}, "vocab_size", "from 1 to"),
        ({"num_labels": 0}, "num_labels", "from 1 to"),
        ({"model_type": "gpt2"}, "model_type", "cannot be changed"),
        ({"architectures": ["LlamaModel"]}, "architectures", "by the field auto_class"),
        ({"torch_dtype": "float99"}, "torch_dtype", "by the field data_type"),
        ({"pad_token_id": 1e9}, "pad_token_id", "1000000000 is no token of a vocabulary of"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_parameters", "'spiral' is no rope_type"),
    ],
)
def test_an_override_that_cannot_be_is_named(overrides: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(InvalidField, match=words) as error:
        examined(overrides)
    assert error.value.violations[0].field == f"config_overrides.{place}"


@pytest.mark.parametrize(
    ("config", "place", "words"),
    [
        ({}, "config.model_type", "nothing"),
        ({"model_type": "lama"}, "config.model_type", "did you mean 'llama'"),
        ({"model_type": ["llama"]}, "config.model_type", "no architecture"),
        ({"model_type": "llama"}, "auto_class", "is needed"),
        ({"model_type": "llama", "architectures": ["os.system"]}, "auto_class", "is needed"),
        ({"model_type": "llama", "colour": "red"}, "config.colour", "no such field"),
        ({"model_type": "clip", "text_config": {"hiden_size": 8}}, "config.text_config.hiden_size", "hidden_size"),
    ],
)
def test_a_whole_configuration_that_cannot_be_is_named(config: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(InvalidField, match=words) as error:
        examined({}, config, is_whole=True)
    assert error.value.violations[0].field == place


def test_a_stored_configuration_may_hold_what_nobody_reads() -> None:
    assert examined({}, {**LLAMA, "colour": "red"})["architecture"] == "LlamaForCausalLM"


def test_a_class_that_the_family_lacks_is_answered_with_those_it_has() -> None:
    with pytest.raises(InvalidField, match=r"llama has no AutoModelForMaskedLM; it has AutoModelForCausalLM"):
        examined({}, auto_class="AutoModelForMaskedLM")


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"text_config": {"auto_map": {"AutoConfig": "x.Y"}}},
        {"custom_pipelines": {"a": 1}},
        {"attn_implementation": "somebody/kernels"},
        {"trust_remote_code": True},
    ],
)
def test_code_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UnsafeWeights):
        check_values(values, "config")


def nested(depth: int) -> dict[str, Any]:
    return {"x": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    "values",
    [
        {"a": math.nan}, {"a": math.inf}, {"a": [1.0, -math.inf]}, {"a": "\0"}, {"a": "x" * 100_000}, {"k" * 300: 1},
        nested(50), {"a": [0] * 30_000},
    ],
)  # fmt: skip
def test_values_that_are_no_configuration_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidField):
        check_values(values, "config")


def test_a_table_must_hold_every_token() -> None:
    check_vocabulary({"vocab_size": 300}, 300, "config")
    check_vocabulary({}, 300, "config")
    with pytest.raises(InvalidField, match="299 is less than the 300 tokens"):
        check_vocabulary({"text_config": {"vocab_size": 299}}, 300, "config")
