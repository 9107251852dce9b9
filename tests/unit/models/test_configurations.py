"""Where configurations and tokenizers are found, and where they are not looked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slipstream_server.errors import DependencyUnavailable, InvalidField, ModelNotFound, SlipstreamError
from slipstream_server.models.configurations import Configurations
from slipstream_server.models.hub import HubAccess
from slipstream_server.models.sources import SourceOptions

Build = Callable[[str], Path]


@pytest.fixture
def root(built_models: Build, tmp_path: Path) -> Path:
    """A root with one model, beside a folder that nobody may name."""
    (tmp_path / "root").mkdir()
    shutil.copytree(built_models("llama"), tmp_path / "root" / "mine")
    shutil.copytree(built_models("bert"), tmp_path / "secret")
    (tmp_path / "root" / "out").symlink_to(tmp_path / "secret")
    return tmp_path / "root"


def configurations(root: Path, known: dict[str, Path] | None = None) -> Configurations:
    options = SourceOptions(
        cache_root=root.parent / "cache",
        hub=HubAccess(is_offline=True, cache_folder=root.parent / "hub"),
        allowed_roots=(root,),
    )
    return Configurations(options, (known or {}).get)


def test_a_known_model_comes_before_everything_else(root: Path, built_models: Build) -> None:
    places = configurations(root, {"gpt2": built_models("gpt2")})
    for spec in ("gpt2", "models/gpt2"):
        found = places.find(spec, "source")
        assert (found.name, found.is_local, found.config["n_embd"]) == ("gpt2", True, 64)


def test_a_folder_of_the_root_is_found_by_its_name(root: Path) -> None:
    found = configurations(root).find("mine", "source")
    assert (found.config["model_type"], found.is_local) == ("llama", True)
    assert configurations(root).tokenizer_folder("mine", "source") == root / "mine"


@pytest.mark.parametrize("spec", ["out", "..", "../secret", "/etc", "~", "./mine", "file:///etc/passwd", "mine/.."])
def test_nothing_outside_the_roots_is_looked_at(root: Path, spec: str) -> None:
    with pytest.raises(ModelNotFound) as error:
        configurations(root).find(spec, "source")
    assert str(root.parent) not in error.value.message


def test_the_catalogue_tells_a_shape_and_no_more(root: Path) -> None:
    """A model made from it would lack what the shape leaves out: its ends, its rotary base."""
    found = configurations(root).find("qwen3-0-6b", "source", shape_only=True)
    assert (found.config["hidden_size"], found.folder, found.is_local) == (1024, None, False)
    with pytest.raises(DependencyUnavailable):
        configurations(root).find("qwen3-0-6b", "source")
    with pytest.raises(DependencyUnavailable):
        configurations(root).find("vit-base-patch16-224", "source")


@pytest.mark.parametrize(
    ("spec", "revision", "error"),
    [
        ("", "", InvalidField),
        ("a\0b", "", InvalidField),
        ("x" * 5000, "", InvalidField),
        ("mine", "main", InvalidField),
        ("models/nothing", "", ModelNotFound),
        ("nothing", "", ModelNotFound),
        ("org/name", "../x", InvalidField),
        ("org/name", "", DependencyUnavailable),
    ],
)
def test_what_cannot_be_found_is_named(root: Path, spec: str, revision: str, error: type[SlipstreamError]) -> None:
    with pytest.raises(error):
        configurations(root).find(spec, "source", revision)


def test_a_model_without_a_tokenizer_has_none(root: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (root / "mine" / name).unlink(missing_ok=True)
    with pytest.raises(InvalidField, match="no tokenizer"):
        configurations(root).tokenizer_folder("mine", "tokenizer_source")
