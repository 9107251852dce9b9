from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slipstream_server.errors import CorruptArtifact, UnsafeWeights
from slipstream_server.models.folder import (
    check_adapter_folder,
    check_model_folder,
    fingerprint,
    refuse_code,
    shard_names,
)

ModelCopy = Callable[[str], Path]
EditJson = Callable[..., None]


def test_a_folder_saved_by_transformers_is_prepared(model_copy: ModelCopy) -> None:
    contents = check_model_folder(model_copy("llama"))
    assert contents.is_prepared
    assert contents.weight_files == ("model.safetensors",)


def test_shards_are_found_by_their_index(model_copy: ModelCopy) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_copy("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = tuple(sorted(path.name for path in folder.glob("model-*.safetensors")))
    assert len(shards) > 1
    assert check_model_folder(folder).weight_files == shards
    (folder / shards[0]).unlink()
    with pytest.raises(CorruptArtifact, match=shards[0]):
        check_model_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_alone_are_unsafe(model_copy: ModelCopy, name: str) -> None:
    folder = model_copy("llama")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsafeWeights, match=name):
        check_model_folder(folder)


def test_no_weights_at_all_are_corrupt(model_copy: ModelCopy) -> None:
    folder = model_copy("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match="missing"):
        check_model_folder(folder)


def test_truncated_weights_are_corrupt(model_copy: ModelCopy) -> None:
    weights = model_copy("llama") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact):
        check_model_folder(weights.parent)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../model.safetensors"},
        {"a": "/etc/model.safetensors"},
        {"a": "sub/model.safetensors"},
        {"a": "..\\model.safetensors"},
        {"a": "x\0.safetensors"},
        {"a": "pytorch_model.bin"},
        {"a": ".."},
        {"a": 1},
        {"a": "ok.safetensors", "b": None},
        {},
        [],
        None,
    ],
)
def test_an_index_may_name_only_safetensors_beside_itself(tmp_path: Path, weight_map: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptArtifact):
        shard_names(index)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "config.json: auto_map"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}, "config.json: auto_map"),
        ("config.json", {"custom_pipelines": {"x": {"impl": "evil.Pipe"}}}, "config.json: custom_pipelines"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "tokenizer_config.json: auto_map"),
    ],
)
def test_remote_code_is_refused_by_name(
    model_copy: ModelCopy, edit_json: EditJson, file: str, change: dict[str, Any], named: str
) -> None:
    folder = model_copy("llama")
    edit_json(folder / file, **change)
    contents = check_model_folder(folder)
    assert not contents.is_prepared
    with pytest.raises(UnsafeWeights, match=named):
        refuse_code(contents)


@pytest.mark.parametrize("value", ["org/kernels", {"": "org/kernels@main"}])
def test_kernels_out_of_a_repository_are_unsafe(model_copy: ModelCopy, edit_json: EditJson, value: Any) -> None:
    folder = model_copy("llama")
    edit_json(folder / "config.json", attn_implementation=value)
    with pytest.raises(UnsafeWeights, match="attn_implementation"):
        check_model_folder(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a":' * 100_000, b"\xff", b'{"a": ' + b"1" * 5000 + b"}"])
def test_a_config_that_is_no_json_object_is_corrupt(model_copy: ModelCopy, content: bytes) -> None:
    folder = model_copy("llama")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"config\.json"):
        check_model_folder(folder)


def test_a_huge_config_is_corrupt(model_copy: ModelCopy) -> None:
    folder = model_copy("llama")
    (folder / "config.json").write_bytes(b'{"a": "' + b"x" * 9_000_000 + b'"}')
    with pytest.raises(CorruptArtifact, match="longer than"):
        check_model_folder(folder)


def test_an_adapter_among_a_models_files_is_refused(model_copy: ModelCopy) -> None:
    folder = model_copy("llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(CorruptArtifact, match="adapter_config"):
        check_model_folder(folder)


def test_what_a_folder_lacks_is_named(model_copy: ModelCopy, edit_json: EditJson) -> None:
    folder = model_copy("llama")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    (folder / "generation_config.json").unlink()
    assert set(check_model_folder(folder).lacks) == {"chat_template.jinja", "generation_config.json"}
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    assert "tokenizer.json" in check_model_folder(folder).lacks


def test_an_encoder_needs_no_generation_config(model_copy: ModelCopy) -> None:
    folder = model_copy("bert")
    assert not (folder / "generation_config.json").exists()
    assert check_model_folder(folder).is_prepared


def test_a_peft_folder_is_accepted(adapter: Path) -> None:
    assert check_adapter_folder(adapter)["peft_type"] == "LORA"


def test_a_pickled_adapter_is_unsafe(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UnsafeWeights, match=r"adapter_model\.bin"):
        check_adapter_folder(tmp_path)


def test_an_adapter_that_names_a_module_to_import_is_unsafe(adapter: Path, tmp_path: Path, edit_json: EditJson) -> None:
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit_json(tmp_path / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")
    with pytest.raises(UnsafeWeights, match="megatron_config"):
        check_adapter_folder(tmp_path)


def test_the_fingerprint_follows_content(model_copy: ModelCopy, edit_json: EditJson) -> None:
    folder = model_copy("llama")
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    edit_json(folder / "config.json", rope_theta=1.0)
    assert fingerprint(folder) != before
