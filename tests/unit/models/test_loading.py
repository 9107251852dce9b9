"""The plain transformers and PEFT calls are the second source: what we load must compute the same."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import slipstream_server
from slipstream_server.errors import (
    CorruptArtifact,
    IncompatibleAdapter,
    InvalidField,
    MissingDependency,
    ModelLoadFailed,
    OutOfMemory,
    UnsafeWeights,
    UnsupportedField,
)
from slipstream_server.models import loading
from slipstream_server.models.load_options import FourBitKind, LoadOptions, Quantization
from slipstream_server.models.loading import AUTO_CLASSES, check_fit, load_model

ModelCopy = Callable[[str], Path]
EditJson = Callable[..., None]

IDS = torch.tensor([[5, 6, 7, 8]])
CPU = LoadOptions(device="cpu")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        arguments = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return torch.as_tensor(model(IDS, **arguments).logits)


@pytest.mark.parametrize(
    ("kind", "class_name", "task"),
    [
        ("llama", "LlamaForCausalLM", "text-generation"),
        ("gpt2", "GPT2LMHeadModel", "text-generation"),
        ("t5", "T5ForConditionalGeneration", "text2text-generation"),
        ("bert", "BertForSequenceClassification", "text-classification"),
    ],
)
def test_loads_what_transformers_would(built_models: ModelCopy, kind: str, class_name: str, task: str) -> None:
    folder = built_models(kind)
    loaded = load_model(folder, CPU)
    assert type(loaded.model).__name__ == class_name
    assert (loaded.task, loaded.device.type, loaded.dtype) == (task, "cpu", torch.float32)
    assert not loaded.model.training
    assert loaded.memory_bytes >= loaded.facts.weight_bytes
    reference = getattr(transformers, class_name).from_pretrained(folder).eval()
    torch.testing.assert_close(logits_of(loaded.model), logits_of(reference), rtol=0, atol=0)


def test_dtype_and_attention_are_what_was_asked(built_models: ModelCopy) -> None:
    loaded = load_model(built_models("llama"), LoadOptions(device="cpu", dtype="bfloat16", attn_implementation="eager"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert (loaded.dtype, loaded.attn_implementation) == (torch.bfloat16, "eager")


def test_the_checkpoints_own_dtype_is_kept(built_models: ModelCopy, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(built_models("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, CPU)
    assert (loaded.dtype, loaded.facts.dtype) == (torch.bfloat16, "bfloat16")


def test_device_map_auto_places_the_model(built_models: ModelCopy) -> None:
    loaded = load_model(built_models("llama"), LoadOptions(device_map="auto"))
    reference = transformers.LlamaForCausalLM.from_pretrained(built_models("llama")).eval()
    torch.testing.assert_close(logits_of(loaded.model.to("cpu")), logits_of(reference), rtol=0, atol=1e-5)


def test_an_adapter_computes_what_peft_computes(built_models: ModelCopy, adapter: Path) -> None:
    from peft import PeftModel

    loaded = load_model(built_models("llama"), LoadOptions(device="cpu", adapter_folder=adapter))
    base = transformers.AutoModelForCausalLM.from_pretrained(built_models("llama"))
    reference = PeftModel.from_pretrained(base, str(adapter)).eval()
    assert isinstance(loaded.model, PeftModel)
    torch.testing.assert_close(logits_of(loaded.model), logits_of(reference), rtol=0, atol=0)
    plain = logits_of(load_model(built_models("llama"), CPU).model)
    assert (logits_of(loaded.model) - plain).abs().max() > 1e-4


def test_an_adapter_of_another_model_is_incompatible(built_models: ModelCopy, adapter: Path) -> None:
    with pytest.raises(IncompatibleAdapter):
        load_model(built_models("gpt2"), LoadOptions(device="cpu", adapter_folder=adapter))


def test_an_adapter_without_all_its_weights_is_incompatible(
    built_models: ModelCopy, adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, tmp_path / "a")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(IncompatibleAdapter, match="lacks weights"):
        load_model(built_models("llama"), LoadOptions(device="cpu", adapter_folder=tmp_path / "a"))


@pytest.mark.parametrize("kind", list(FourBitKind))
def test_four_bits_load_and_run_on_a_cpu(built_models: ModelCopy, kind: FourBitKind) -> None:
    options = LoadOptions(
        device="cpu", quantization=Quantization.FOUR_BIT, four_bit_kind=kind, double_quantization=True,
        compute_dtype="float32",
    )  # fmt: skip
    loaded = load_model(built_models("llama"), options)
    layer = loaded.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.weight.quant_state.quant_type == kind.value
    assert loaded.memory_bytes < loaded.facts.weight_bytes
    assert torch.isfinite(logits_of(loaded.model)).all()


def test_four_bits_run_on_a_cpu_with_shapes_its_packed_format_cannot_hold(
    built_models: ModelCopy, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig.from_pretrained(built_models("llama"), intermediate_size=96)
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, LoadOptions(device="cpu", quantization=Quantization.FOUR_BIT))
    assert type(loaded.model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    reference = logits_of(load_model(tmp_path, CPU).model)
    similarity = torch.nn.functional.cosine_similarity(logits_of(loaded.model).flatten(), reference.flatten(), dim=0)
    assert similarity > 0.9


def test_eight_bits_load_and_run_on_a_cpu(built_models: ModelCopy) -> None:
    loaded = load_model(built_models("llama"), LoadOptions(device="cpu", quantization=Quantization.EIGHT_BIT))
    assert type(loaded.model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    reference = logits_of(load_model(built_models("llama"), CPU).model)
    assert (
        torch.nn.functional.cosine_similarity(logits_of(loaded.model).float().flatten(), reference.flatten(), dim=0)
        > 0.99
    )


def test_quantizing_twice_is_refused(model_copy: ModelCopy, edit_json: EditJson) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedField, match="gptq"):
        load_model(folder, LoadOptions(device="cpu", quantization=Quantization.FOUR_BIT))


BITS_4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_what_bitsandbytes_has_stored_loads(built_models: ModelCopy, tmp_path: Path) -> None:
    for number, bits in enumerate(({"load_in_4bit": True}, {"load_in_8bit": True})):
        stored = transformers.AutoModelForCausalLM.from_pretrained(
            built_models("llama"), quantization_config=transformers.BitsAndBytesConfig(**bits), device_map={"": "cpu"}
        )
        folder = tmp_path / str(number)
        stored.save_pretrained(folder)
        check_fit(folder, CPU)
        torch.testing.assert_close(logits_of(load_model(folder, CPU).model), logits_of(stored))


@pytest.mark.parametrize(
    ("stored", "error", "words"),
    [
        ("yes", CorruptArtifact, "quantization_config is no object"),
        ({"quant_method": "perpetuum"}, ModelLoadFailed, "'perpetuum' is no method"),
        ({"bits": 4}, ModelLoadFailed, "'unknown' is no method"),
        (BITS_4, CorruptArtifact, "says that bitsandbytes has quantized the weights, and it has not"),
        ({"load_in_8bit": True}, CorruptArtifact, "says that bitsandbytes has quantized the weights, and it has not"),
        ({"quant_method": "aqlm", "nbits_per_codebook": 16}, MissingDependency, "aqlm"),
    ],
)
def test_what_is_stored_quantized_and_cannot_be_read_is_said_before_it_is_read(
    model_copy: ModelCopy, edit_json: EditJson, stored: Any, error: type[Exception], words: str
) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", quantization_config=stored)
    for judge in (load_model, check_fit):
        with pytest.raises(error, match=words):
            judge(folder, CPU)


@pytest.mark.parametrize(("package", "options"), [
    ("bitsandbytes", LoadOptions(quantization=Quantization.EIGHT_BIT)),
    ("accelerate", LoadOptions(device_map="auto")),
])  # fmt: skip
def test_a_missing_package_is_named(
    built_models: ModelCopy, monkeypatch: pytest.MonkeyPatch, package: str, options: LoadOptions
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(MissingDependency, match=package):
        load_model(built_models("llama"), options)


def test_a_head_the_checkpoint_lacks_is_a_failure_unless_it_was_meant(built_models: ModelCopy) -> None:
    with pytest.raises(ModelLoadFailed, match="missing"):
        load_model(built_models("llama"), LoadOptions(device="cpu", task="text-classification"))
    fresh = load_model(
        built_models("llama"), LoadOptions(device="cpu", task="text-classification", allow_new_weights=True)
    )
    assert type(fresh.model).__name__ == "LlamaForSequenceClassification"


def test_a_shape_that_does_not_fit_is_a_failure(model_copy: ModelCopy, edit_json: EditJson) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", vocab_size=301)
    with pytest.raises(ModelLoadFailed, match="has another shape") as caught:
        load_model(folder, CPU)
    assert str(folder) not in caught.value.message


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_what_loads_fits_and_what_does_not_fit_is_told_without_its_weights(
    model_copy: ModelCopy, edit_json: EditJson, kind: str
) -> None:
    folder = model_copy(kind)
    load_model(folder, CPU)
    check_fit(folder, CPU)
    layers = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 9)
    activation = dict.fromkeys(("hidden_act", "activation_function", "dense_act_fn"), "nonsense")
    for values in ({"vocab_size": 301}, layers, activation):
        wrong = model_copy(kind)
        edit_json(wrong / "config.json", **values)
        for judge in (load_model, check_fit):
            with pytest.raises(ModelLoadFailed):
                judge(wrong, CPU)


def test_fitting_takes_no_memory(built_models: ModelCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Any] = []
    read_into = loading._read_into

    def noted(*arguments: Any) -> tuple[Any, Any]:
        model, report = read_into(*arguments)
        places.extend(parameter.device.type for parameter in model.parameters())
        return model, report

    monkeypatch.setattr(loading, "_read_into", noted)
    check_fit(built_models("llama"), CPU)
    assert set(places) == {"meta"}


def test_an_unknown_architecture_is_a_failure(model_copy: ModelCopy, edit_json: EditJson) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", model_type="perpetuum_mobile")
    for judge in (load_model, check_fit):
        with pytest.raises(ModelLoadFailed, match="'perpetuum_mobile' is no architecture of transformers"):
            judge(folder, CPU)


def test_unsafe_and_damaged_folders_never_reach_transformers(model_copy: ModelCopy, edit_json: EditJson) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UnsafeWeights, match="auto_map"):
        load_model(folder, CPU)
    damaged = model_copy("bert")
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptArtifact):
        load_model(damaged, CPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_no_memory_left_is_said_as_such(
    built_models: ModelCopy, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemory):
        load_model(built_models("llama"), CPU)


@pytest.mark.parametrize(
    ("options", "field"), [(LoadOptions(task="mind-reading"), "task"), (LoadOptions(device="cuda:99"), "device")]
)
def test_what_this_machine_or_build_has_not_is_named(built_models: ModelCopy, options: LoadOptions, field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        load_model(built_models("llama"), options)


def test_every_auto_class_exists() -> None:
    for name in AUTO_CLASSES.values():
        assert hasattr(transformers, name)


def test_the_front_can_use_this_room_without_torch(built_models: ModelCopy, tmp_path: Path) -> None:
    program = f"""
import sys
from slipstream_server.models import catalogue, estimate, facts, load_options, pull, sources
options = sources.SourceOptions(cache_root=sources.Path({str(tmp_path)!r}))
prepared = sources.resolve({str(built_models("llama"))!r}, options=options)
estimate.estimate_memory(facts.read_facts(prepared.folder))
load_options.parse_load_options({{"dtype": "bf16"}})
pull.list_models()
heavy = {{"torch", "transformers", "peft", "numpy", "grpc", "google.protobuf"}} & sys.modules.keys()
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    package_root = str(Path(slipstream_server.__file__).parent.parent)
    environment = {"PYTHONPATH": package_root, "SLIPSTREAM_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
