"""Against a real HTTP server on loopback that speaks the hub's paths, and against ports where nobody answers."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.models.fake_hub import COMMIT, FakeHub, run_fake_hub

from slipstream_server.errors import (
    DependencyUnavailable,
    InvalidField,
    ModelNotFound,
    StorageFull,
    UnsafeWeights,
)
from slipstream_server.models import cache
from slipstream_server.models.hub import HubAccess, fetch_snapshot, parse_hub_id
from slipstream_server.models.progress import PullProgress, ignore_progress


@pytest.fixture
def hub(tmp_path: Path, built_models: Callable[[str], Path]) -> Iterator[FakeHub]:
    shutil.copytree(built_models("llama"), tmp_path / "hub" / "org" / "tiny")
    with run_fake_hub(tmp_path / "hub") as fake:
        yield fake


@pytest.fixture
def access(hub: FakeHub, tmp_path: Path) -> HubAccess:
    return HubAccess(endpoint=hub.endpoint, cache_folder=tmp_path / "hf")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_downloads_the_files_of_a_model_and_nothing_else(hub: FakeHub, access: HubAccess) -> None:
    repository = hub.root / "org" / "tiny"
    for name in ("pytorch_model.bin", "evil.py", "consolidated.safetensors", "README.md"):
        (repository / name).write_bytes(b"x")
    (repository / "onnx").mkdir()
    (repository / "onnx" / "config.json").write_bytes(b"{}")
    told: list[PullProgress] = []
    snapshot = fetch_snapshot("org/tiny", "main", access, told.append)
    assert snapshot.revision == COMMIT
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {path.name for path in snapshot.folder.rglob("*")} == expected
    assert set(hub.fetched) == expected
    assert (snapshot.folder / "model.safetensors").read_bytes() == (repository / "model.safetensors").read_bytes()
    assert told[-1].done_bytes == told[-1].total_bytes == sum((repository / name).stat().st_size for name in expected)


def test_a_second_fetch_downloads_nothing(hub: FakeHub, access: HubAccess) -> None:
    fetch_snapshot("org/tiny", "main", access, ignore_progress)
    hub.fetched.clear()
    fetch_snapshot("org/tiny", "main", access, ignore_progress)
    assert hub.fetched == []


@pytest.mark.parametrize("how", ["offline", "closed port", "server error"])
def test_without_an_answer_the_local_cache_serves(hub: FakeHub, access: HubAccess, how: str) -> None:
    first = fetch_snapshot("org/tiny", "main", access, ignore_progress)
    if how == "offline":
        access = replace(access, is_offline=True)
    elif how == "closed port":
        access = replace(access, endpoint=f"http://127.0.0.1:{closed_port()}")
    else:
        hub.status = 503
    hub.fetched.clear()
    assert fetch_snapshot("org/tiny", "main", access, ignore_progress) == first
    assert hub.fetched == []


def test_a_closed_port_is_unavailable_at_once(tmp_path: Path) -> None:
    access = HubAccess(endpoint=f"http://127.0.0.1:{closed_port()}", cache_folder=tmp_path)
    began = time.monotonic()
    with pytest.raises(DependencyUnavailable, match="org/tiny"):
        fetch_snapshot("org/tiny", "main", access, ignore_progress)
    assert time.monotonic() - began < 3


def test_a_hub_that_accepts_and_stays_silent_is_given_up_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        access = HubAccess(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", cache_folder=tmp_path, timeout_s=0.5)
        began = time.monotonic()
        with pytest.raises(DependencyUnavailable):
            fetch_snapshot("org/tiny", "main", access, ignore_progress)
        assert time.monotonic() - began < 3


def test_only_pickled_weights_are_refused_before_any_download(hub: FakeHub, access: HubAccess) -> None:
    (hub.root / "org" / "tiny" / "model.safetensors").rename(hub.root / "org" / "tiny" / "pytorch_model.bin")
    with pytest.raises(UnsafeWeights, match=r"pytorch_model\.bin"):
        fetch_snapshot("org/tiny", "main", access, ignore_progress)
    assert hub.fetched == []


def test_unknown_repositories_and_revisions_are_not_found(access: HubAccess) -> None:
    with pytest.raises(ModelNotFound, match="org/other"):
        fetch_snapshot("org/other", "main", access, ignore_progress)
    with pytest.raises(ModelNotFound, match="revision 'v9'"):
        fetch_snapshot("org/tiny", "v9", access, ignore_progress)


def test_a_full_disk_is_noticed_before_the_download(
    hub: FakeHub, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(StorageFull):
        fetch_snapshot("org/tiny", "main", access, ignore_progress)
    assert hub.fetched == []


def test_a_tokenizer_alone_brings_no_weights(hub: FakeHub, access: HubAccess) -> None:
    folder = fetch_snapshot("org/tiny", "main", access, ignore_progress, tokenizer_only=True).folder
    assert (folder / "tokenizer.json").is_file()
    assert "model.safetensors" not in hub.fetched


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("org/name", ("org/name", "main")),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("name", None),
        ("org/name/more", None),
        ("../name", None),
        ("org/..", None),
        ("/etc/passwd", None),
        ("http://169.254.169.254/x", None),
        ("org/naïve", None),
        ("", None),
    ],
)
def test_what_a_hub_id_is(spec: str, parsed: tuple[str, str] | None) -> None:
    assert parse_hub_id(spec) == parsed


@pytest.mark.parametrize("revision", ["", "../x", "a b", "x" * 200, "-x"])
def test_bad_revisions_are_refused(revision: str) -> None:
    with pytest.raises(InvalidField, match="revision"):
        parse_hub_id(f"org/name@{revision}")
