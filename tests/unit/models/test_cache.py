from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

import slipstream_server
from slipstream_server.errors import StorageFull
from slipstream_server.models.cache import ModelCache, default_cache_root, require_free_bytes

# Builds "key" slowly enough to be overtaken: says that it has begun, then waits to be told to finish.
BUILDER = """
import sys
from pathlib import Path
from slipstream_server.models.cache import ModelCache
def fill(target):
    (target / "half").write_text("half")
    print("begun", flush=True)
    sys.stdin.readline()
    (target / "config.json").write_text("{}")
    return {"by": "child"}
ModelCache(Path(sys.argv[1])).build("key", fill)
print("done", flush=True)
"""


def start_builder(root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(slipstream_server.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def fill_here(target: Path) -> Mapping[str, str]:
    (target / "config.json").write_text("{}")
    return {"by": "parent"}


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    folder = cache.build("key", fill_here)
    assert (folder / "slipstream.json").read_text().count("parent") == 1

    def never(target: Path) -> Mapping[str, str]:
        raise AssertionError("built twice")

    assert cache.build("key", never) == folder


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(target: Path) -> Mapping[str, str]:
        (target / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ModelCache(tmp_path).build("key", fail)
    assert not ModelCache(tmp_path).folder("key").exists()
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_second_process_waits_for_the_first_and_takes_its_folder(tmp_path: Path) -> None:
    with start_builder(tmp_path) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "begun\n"
        folders: list[Path] = []
        waiting = threading.Thread(target=lambda: folders.append(ModelCache(tmp_path).build("key", fill_here)))
        waiting.start()
        assert not ModelCache(tmp_path).folder("key").exists()
        child.stdin.write("go\n")
        child.stdin.flush()
        waiting.join(timeout=20)
        assert not waiting.is_alive()
    assert "child" in (folders[0] / "slipstream.json").read_text()


def test_a_killed_builder_leaves_no_folder_and_no_lock(tmp_path: Path) -> None:
    with start_builder(tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGKILL)
    assert len(list((tmp_path / "partial").iterdir())) == 1
    folder = ModelCache(tmp_path).build("key", fill_here)
    assert "parent" in (folder / "slipstream.json").read_text()
    assert not (folder / "half").exists()
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_pointer_to_a_vanished_folder_is_forgotten(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    folder = cache.build("key", fill_here)
    cache.remember("name", {"folder": str(folder)})
    assert cache.recall("name") == {"folder": str(folder)}
    (folder / "config.json").unlink()
    assert cache.recall("name") is None
    assert cache.recall("other") is None


def test_a_damaged_pointer_is_forgotten(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    cache.remember("name", {"folder": "x"})
    (tmp_path / "pointers" / "name.json").write_text("{")
    assert cache.recall("name") is None


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    require_free_bytes(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageFull, match="bytes are needed"):
        require_free_bytes(tmp_path, 2**60)


def test_the_root_follows_slipstream_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    assert default_cache_root() == tmp_path / "models"
