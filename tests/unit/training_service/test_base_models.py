"""Which names lead to which folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.tiny_model import write_tiny_model

from slipstream_server.errors import ModelNotFound, SlipstreamError
from slipstream_server.models.folder import PROVENANCE
from slipstream_server.training.base_models import BaseModels


def made_model(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True)
    write_tiny_model(root / name)
    (root / name / PROVENANCE).write_text("{}")
    return root / name


@pytest.mark.parametrize("spec", ["models/fresh", "fresh"])
def test_a_made_model_is_a_base_by_its_name(tmp_path: Path, spec: str) -> None:
    made_model(tmp_path, "fresh")
    base = BaseModels({}, (), made=tmp_path).resolve(spec)
    assert (base.name, base.served_as, base.revision) == ("models/fresh", "models/fresh", "")
    assert base.folder == tmp_path / "fresh"


def test_the_operators_own_model_of_that_name_comes_first(tmp_path: Path) -> None:
    made_model(tmp_path / "made", "same")
    served = made_model(tmp_path / "served", "same")
    assert BaseModels({"same": str(served)}, (), made=tmp_path / "made").resolve("same").folder == served


def test_a_model_that_is_being_made_is_none_yet(tmp_path: Path) -> None:
    (made_model(tmp_path, "half") / PROVENANCE).unlink()
    with pytest.raises(ModelNotFound):
        BaseModels({}, (), made=tmp_path).resolve("models/half")


@pytest.mark.parametrize("spec", ["models/../made", "models/.", "models/a\0b", "models//etc", "models/link"])
def test_a_name_never_leads_out_of_the_folder(tmp_path: Path, spec: str) -> None:
    made_model(tmp_path, "made")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "made")
    with pytest.raises(SlipstreamError):
        BaseModels({}, (), made=tmp_path / "inside").resolve(spec)
