"""What an adapter is by its files alone, and which base it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.unit.adapters.lora_files import HIDDEN, INNER, base_tensors, lora_tensors, peft_config

from slipstream_server.adapters import configuration
from slipstream_server.adapters.compatibility import compatible
from slipstream_server.adapters.inspection import AdapterFacts, inspect
from slipstream_server.errors import CorruptArtifact, IncompatibleAdapter
from slipstream_server.models.safetensors_header import TensorEntry, read_header

PREFIX = "base_model.model."


def header_of(tensors: Mapping[str, np.ndarray], folder: Path) -> Mapping[str, TensorEntry]:
    """The header that safetensors itself writes for ``tensors``."""
    save_file(dict(tensors), folder / "t.safetensors")
    return read_header(folder / "t.safetensors")


def parsed(**changes: Any) -> configuration.LoraConfiguration:
    return configuration.parse(json.dumps(peft_config(**changes)).encode())


def facts_of(folder: Path, tensors: Mapping[str, np.ndarray] | None = None, **changes: Any) -> AdapterFacts:
    return inspect(parsed(**changes), header_of(tensors or lora_tensors(), folder))


def test_shapes_ranks_and_counts_come_from_the_tensors(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    q_proj = facts.modules["model.layers.0.self_attn.q_proj"]
    down_proj = facts.modules["model.layers.1.mlp.down_proj"]
    assert (q_proj.num_inputs, q_proj.num_outputs, q_proj.rank) == (HIDDEN, HIDDEN, 4)
    assert (down_proj.num_inputs, down_proj.num_outputs) == (INNER, HIDDEN)
    assert facts.num_parameters == sum(tensor.size for tensor in lora_tensors().values())
    assert facts.dtype == "float32"


def test_targets_without_tensors_are_left_out(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, target_modules=["q_proj", "v_proj", "mlp.down_proj"])
    assert facts.configuration.target_modules == ("mlp.down_proj", "q_proj")


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ".*(a+)+$"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"exclude_modules": ["lm_head"]},
    ],
)
def test_a_pattern_that_chose_the_modules_is_replaced_by_the_modules(tmp_path: Path, selection: dict[str, Any]) -> None:
    facts = facts_of(tmp_path, **selection)
    stored = json.loads(configuration.canonical_bytes(facts.configuration))
    assert stored["target_modules"] == [
        f"model.layers.{layer}.{module}" for layer in (0, 1) for module in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert not stored.keys() & {"layers_to_transform", "layers_pattern", "exclude_modules"}


def test_ranks_may_differ_where_a_pattern_says_so(tmp_path: Path) -> None:
    tensors = lora_tensors()
    for layer in (0, 1):
        module = f"{PREFIX}model.layers.{layer}.mlp.down_proj"
        tensors[f"{module}.lora_A.weight"] = np.zeros((2, INNER), np.float32)
        tensors[f"{module}.lora_B.weight"] = np.zeros((HIDDEN, 2), np.float32)
    facts = facts_of(tmp_path, tensors, rank_pattern={"mlp.down_proj": 2})
    assert {module.rank for module in facts.modules.values()} == {2, 4}
    assert facts.largest_rank == 4
    with pytest.raises(CorruptArtifact, match="rank"):
        facts_of(tmp_path, tensors, rank_pattern={"q_proj": 4})


def test_a_head_is_kept_where_modules_to_save_names_it(tmp_path: Path) -> None:
    tensors = {**lora_tensors(), f"{PREFIX}score.weight": np.zeros((3, HIDDEN), np.float32)}
    facts = facts_of(tmp_path, tensors, modules_to_save=["score"], task_type="SEQ_CLS")
    assert facts.saved_whole == {"score.weight": (3, HIDDEN)}
    with pytest.raises(IncompatibleAdapter, match="modules_to_save"):
        facts_of(tmp_path, tensors)


def test_dora_has_a_magnitude_for_every_module(tmp_path: Path) -> None:
    tensors = lora_tensors()
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        tensors[name.replace("lora_A.weight", "lora_magnitude_vector")] = np.ones(HIDDEN, np.float32)
    assert facts_of(tmp_path, tensors, use_dora=True).configuration.use_dora
    with pytest.raises(CorruptArtifact, match="magnitude"):
        facts_of(tmp_path, tensors)
    with pytest.raises(CorruptArtifact, match="magnitude"):
        facts_of(tmp_path, use_dora=True)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_weights_are_floating_point(tmp_path: Path, dtype: type) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in lora_tensors().items()}
    with pytest.raises(IncompatibleAdapter, match="adapters are F64, F32, BF16, F16"):
        facts_of(tmp_path, tensors)


def test_an_adapter_fits_the_base_it_was_made_for(tmp_path: Path) -> None:
    compatible(facts_of(tmp_path), header_of(base_tensors(), tmp_path))


def test_a_head_less_checkpoint_is_recognised_by_the_ends_of_its_names(tmp_path: Path) -> None:
    headless = {name.removeprefix("model."): tensor for name, tensor in base_tensors().items()}
    compatible(facts_of(tmp_path), header_of(headless, tmp_path))


def test_another_base_is_refused_with_the_first_misfit(tmp_path: Path) -> None:
    wider = header_of(base_tensors(hidden=32), tmp_path)
    with pytest.raises(IncompatibleAdapter, match=r"\[32, 24\].*24 inputs and 16 outputs"):
        compatible(facts_of(tmp_path), wider)
    shallower = {name: tensor for name, tensor in base_tensors().items() if ".layers.1." not in name}
    with pytest.raises(IncompatibleAdapter, match=r"no module 'model\.layers\.1"):
        compatible(facts_of(tmp_path), header_of(shallower, tmp_path))


def test_transposed_layers_fit_only_where_the_configuration_says_so(tmp_path: Path) -> None:
    transposed = {name: np.ascontiguousarray(tensor.T) for name, tensor in base_tensors().items()}
    base = header_of(transposed, tmp_path)
    compatible(facts_of(tmp_path, fan_in_fan_out=True), base)
    with pytest.raises(IncompatibleAdapter):
        compatible(facts_of(tmp_path), base)


def test_tied_embeddings_and_new_heads_fit(tmp_path: Path) -> None:
    adapter = {
        f"{PREFIX}lm_head.lora_A.weight": np.zeros((4, HIDDEN), np.float32),
        f"{PREFIX}lm_head.lora_B.weight": np.zeros((32, 4), np.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_A": np.zeros((4, 32), np.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": np.zeros((HIDDEN, 4), np.float32),
        f"{PREFIX}classifier.weight": np.zeros((5, HIDDEN), np.float32),
    }
    facts = facts_of(tmp_path, adapter, target_modules=["lm_head", "embed_tokens"], modules_to_save=["classifier"])
    base = {**base_tensors(), "classifier.weight": np.zeros((2, HIDDEN), np.float32)}
    compatible(facts, header_of(base, tmp_path))


def test_packed_weights_are_asked_for_their_presence_only(tmp_path: Path) -> None:
    packed = {name: np.zeros((7, 1), np.uint8) if "proj" in name else tensor for name, tensor in base_tensors().items()}
    compatible(facts_of(tmp_path), header_of(packed, tmp_path))


def test_paths_are_told_from_names() -> None:
    for path in ("/data/model", "./model", "../model", "~/model", "C:\\model", "a/b/c"):
        assert configuration.is_path(path), path
    for name in ("org/model", "smollm2-135m-instruct", ""):
        assert not configuration.is_path(name), name
