"""Whether an adapter can be served on a model: its base's name, its shapes, and what a shared batch can apply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save, save_file

from slipstream_server.adapters.fitting import ServingBase, check_fit
from slipstream_server.errors import CorruptArtifact, IncompatibleAdapter
from unit.adapters.lora_files import BASE, CONFIG, WEIGHTS, base_tensors, lora_files, lora_tensors, peft_config


@pytest.fixture
def base(tmp_path: Path) -> ServingBase:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file(base_tensors(), folder / "model.safetensors")
    return ServingBase(model="tiny", folder=folder, max_rank=8)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def with_names(base: ServingBase, *names: str) -> ServingBase:
    return ServingBase(model=base.model, folder=base.folder, known_as=frozenset(names), max_rank=base.max_rank)


@pytest.mark.parametrize(
    ("trained_on", "known_as", "fits"),
    [
        ("models/tiny", (), True),
        ("models/other", (), False),
        ("models/other", (BASE,), False),
        (BASE, (BASE,), True),
        (f"{BASE}@main", (BASE,), True),
        ("ORG/Tiny", (BASE,), True),
        ("org/another", (BASE,), False),
        # Served out of a folder: nobody can tell what it is called elsewhere.
        ("org/another", (), True),
        ("tiny", (BASE,), True),
        ("", (BASE,), True),
    ],
)
def test_the_name_of_the_base_counts_where_both_sides_have_one(
    base: ServingBase, tmp_path: Path, trained_on: str, known_as: tuple[str, ...], fits: bool
) -> None:
    folder = write(tmp_path / "adapter", lora_files())
    if fits:
        check_fit(folder, trained_on, with_names(base, *known_as))
    else:
        with pytest.raises(IncompatibleAdapter, match="another base"):
            check_fit(folder, trained_on, with_names(base, *known_as))


def test_shapes_count_whatever_the_name_says(base: ServingBase, tmp_path: Path) -> None:
    save_file(base_tensors(hidden=20), base.folder / "model.safetensors")
    with pytest.raises(IncompatibleAdapter, match="shape"):
        check_fit(write(tmp_path / "adapter", lora_files()), "models/tiny", base)


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        ({"r": 9}, lora_tensors(rank=9), "rank 9 is above 8"),
        (
            {"modules_to_save": ["lm_head"]},
            {**lora_tensors(), "base_model.model.lm_head.weight": base_tensors()["model.embed_tokens.weight"]},
            "as a whole",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            {
                "base_model.model.model.embed_tokens.lora_embedding_A": lora_tensors()[
                    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
                ].repeat(2, axis=1),
                "base_model.model.model.embed_tokens.lora_embedding_B": lora_tensors()[
                    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
                ],
            },
            "embedding",
        ),
    ],
)
def test_what_a_shared_batch_cannot_apply_is_refused(
    base: ServingBase, tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], match: str
) -> None:
    raw = json.dumps(peft_config(**config)).encode()
    folder = write(tmp_path / "adapter", {CONFIG: raw, WEIGHTS: save(tensors)})
    with pytest.raises(IncompatibleAdapter, match=match):
        check_fit(folder, BASE, base)


def test_a_missing_file_is_corrupt(base: ServingBase, tmp_path: Path) -> None:
    files = lora_files()
    del files[CONFIG]
    with pytest.raises(CorruptArtifact):
        check_fit(write(tmp_path / "adapter", files), BASE, base)
