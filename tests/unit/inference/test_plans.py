"""From what was asked to how a worker runs it: every option arrives, and the engine is chosen by what the model is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.inference.conftest import llama_facts

from slipstream_server.config import load_settings
from slipstream_server.errors import CorruptArtifact, InvalidField, ModelNotFound, PermissionDenied, UnsupportedField
from slipstream_server.inference.engines import CONTINUOUS, TASKS, engine_for
from slipstream_server.inference.load_choice import LoadChoice
from slipstream_server.inference.model_places import client_place, operator_place
from slipstream_server.inference.plans import ServingDefaults, held_quantization, plan_of
from slipstream_server.inference.served_model import ModelPlan
from slipstream_server.models.facts import ModelFacts, facts_of_config
from slipstream_server.models.load_options import FourBitKind, Quantization
from slipstream_server.models.model_card import CARD, licence_of
from slipstream_server.models.sources import PreparedModel

PREPARED = PreparedModel(name="tiny", folder=Path("prepared"), source="hub org/tiny", revision="abc")
SEQ2SEQ = facts_of_config(
    {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True, "vocab_size": 9}
)
ENCODER = facts_of_config({"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 9})


def planned(choice: LoadChoice, facts: ModelFacts | None = None, **defaults: object) -> ModelPlan:
    settings = ServingDefaults(**{"batching": "padded", **defaults})  # type: ignore[arg-type]
    return plan_of("tiny", "org/tiny", PREPARED, facts or llama_facts(), choice, settings)


def test_every_option_arrives_at_the_worker() -> None:
    choice = LoadChoice(
        data_type="bfloat16", quantization="fp4", double_quantization=True, device="cuda:1",
        attention_implementation="eager", batching="padded", context_tokens=128, max_running_sequences=5,
        adapter_slot_count=0, max_adapter_rank=7, prefix_caching=False,
    )  # fmt: skip
    plan = planned(choice)
    load = plan.worker.load
    assert (load.dtype, load.quantization, load.four_bit_kind) == ("bfloat16", Quantization.FOUR_BIT, FourBitKind.FP4)
    assert (load.double_quantization, load.device, load.device_map) == (True, "cuda:1", None)
    assert load.attn_implementation == "eager"
    assert (plan.max_context_tokens, plan.worker.max_batch_size) == (128, 5)
    assert (plan.worker.adapter_slots, plan.worker.max_adapter_rank) == (0, 7)
    assert (plan.source, plan.revision) == ("org/tiny", "abc")


def test_what_is_not_chosen_is_the_operators() -> None:
    plan = planned(LoadChoice(), device_map="auto", dtype="float16", quantization="8bit", max_batch_size=9)
    load = plan.worker.load
    assert (load.device_map, load.dtype, load.quantization) == ("auto", "float16", Quantization.EIGHT_BIT)
    assert (plan.worker.max_batch_size, plan.max_context_tokens) == (9, None)


@pytest.mark.parametrize(
    ("word", "held"), [("int8", "int8"), ("8bit", "int8"), ("4bit", "nf4"), ("nf4", "nf4"), ("fp4", "fp4")]
)
def test_the_operators_quantization_is_spelt_as_a_clients(word: str, held: str) -> None:
    configured = load_settings(environment={}, flags={"inference.quantization": word}).inference.quantization
    assert held_quantization(planned(LoadChoice(), quantization=configured)) == held


def test_a_named_device_takes_the_place_of_the_operators_device_map() -> None:
    assert planned(LoadChoice(device="cpu"), device_map="auto").worker.load.device_map is None
    balanced = planned(LoadChoice(device="balanced"), device="cuda:3").worker.load
    assert (balanced.device, balanced.device_map) == ("auto", "balanced")


def test_the_context_is_at_most_the_models_own() -> None:
    assert planned(LoadChoice(context_tokens=4096)).max_context_tokens == 4096
    with pytest.raises(InvalidField, match="4097"):
        planned(LoadChoice(context_tokens=4097))


@pytest.mark.parametrize(
    ("method", "asked", "is_refused"),
    [
        ("gptq", "gptq", False),
        ("gptq", "awq", True),
        (None, "awq", True),
        ("gptq", "nf4", True),
        ("awq", "none", False),
    ],
)
def test_stored_quantizations_are_what_they_are(method: str | None, asked: str, is_refused: bool) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9}
    facts = facts_of_config(config | ({"quantization_config": {"quant_method": method}} if method else {}))
    if is_refused:
        with pytest.raises(UnsupportedField, match="quantiz"):
            planned(LoadChoice(quantization=asked), facts)
    else:
        assert planned(LoadChoice(quantization=asked), facts).worker.load.quantization is Quantization.NONE


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True}, "fp4"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "int8"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "hqq"}, ""),
        (None, "none"),
    ],
)
def test_what_is_stored_quantized_is_shown_as_it_is_held(stored: dict[str, object] | None, held: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9}
    plan = planned(LoadChoice(), facts_of_config({**config, "quantization_config": stored}))
    assert held_quantization(plan) == held


def test_the_engine_follows_the_model_unless_somebody_says_otherwise() -> None:
    decoder = facts_of_config(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9, "hidden_size": 8,
         "num_attention_heads": 2, "num_hidden_layers": 1}
    )  # fmt: skip
    assert engine_for(decoder, "", "auto") == CONTINUOUS
    assert engine_for(decoder, "", "padded") == "padded"
    assert engine_for(decoder, "padded", "auto") == "padded"
    assert engine_for(SEQ2SEQ, "", "auto") == "padded"
    assert engine_for(decoder, "", "null") == "null"
    with pytest.raises(UnsupportedField, match="CONTINUOUS"):
        engine_for(SEQ2SEQ, "continuous", "auto")
    with pytest.raises(UnsupportedField):
        engine_for(ENCODER, "padded", "auto")
    assert engine_for(ENCODER, "", "auto") == TASKS


def test_a_configuration_without_architectures_says_what_is_missing() -> None:
    facts = facts_of_config({"model_type": "llama", "vocab_size": 9})
    with pytest.raises(CorruptArtifact, match="architectures is missing"):
        planned(LoadChoice(), facts)


def test_no_path_of_the_operator_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "some model"
    folder.mkdir()
    assert operator_place(str(folder)).source == "some model"
    assert operator_place("org/name@main").source == "org/name"
    assert operator_place("smollm2-135m-instruct").source == "smollm2-135m-instruct"
    assert operator_place("elsewhere/weights.gguf").locator == "elsewhere/weights.gguf"


def test_a_clients_revision_goes_with_a_hub_id_only(tmp_path: Path) -> None:
    assert client_place("org/name", "v1.0", ()).locator == "org/name@v1.0"
    for source, revision in (("smollm2-135m-instruct", "main"), ("org/name", "../x"), ("org/name@main", "")):
        with pytest.raises(InvalidField):
            client_place(source, revision, (tmp_path,))


def test_in_a_root_only_folders_and_gguf_files_are_models(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for name in ("tiny.gguf", "notes.txt", "tiny/config.json"):
        (tmp_path / name).write_text("{}")
    assert client_place("tiny", "", (tmp_path,)).locator == str(tmp_path / "tiny")
    assert client_place("tiny.gguf", "", (tmp_path,)).source == "tiny.gguf"
    with pytest.raises(ModelNotFound):
        client_place("notes.txt", "", (tmp_path,))
    for path in (tmp_path / "tiny" / "config.json", tmp_path):
        with pytest.raises(PermissionDenied):
            client_place(str(path), "", (tmp_path,))


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# x", "MIT"),
        ("---\r\nlicense: 'llama3.2'\r\n---\r\n", "llama3.2"),
        ("---\nlicense: other\nlicense_name: own-licence\n---\n", "own-licence"),
        ("# no front matter\nlicense: mit\n", ""),
        ("---\nlanguage: en\n---\n", ""),
    ],
)
def test_the_licence_is_what_the_card_says(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / CARD).write_text(card)
    assert licence_of(tmp_path) == licence
    assert licence_of(tmp_path / "nowhere") == ""


def test_kv_memory_on_a_gpu_is_the_models_share_unless_tokens_are_given() -> None:
    assert planned(LoadChoice(), memory_fraction=0.7).worker.kv_memory_fraction == 0.7
    assert planned(LoadChoice(memory_fraction=0.3), memory_fraction=0.7).worker.kv_memory_fraction == 0.3
    assert planned(LoadChoice(memory_fraction=0.3), max_batch_tokens=4096).worker.kv_memory_fraction == 0.0
