"""The safetensors library itself writes the good files; the bad ones are those files, damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from slipstream_server.errors import CorruptArtifact
from slipstream_server.models import safetensors_header
from slipstream_server.models.safetensors_header import read_header


@pytest.fixture
def good_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {"a": np.ones((3, 5), np.float32), "b": np.zeros((7,), np.float16), "scalar": np.array(1, np.int64)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_reads_what_the_library_wrote(good_file: Path) -> None:
    entries = read_header(good_file)
    with safe_open(good_file, "np") as reference:
        assert set(entries) == set(reference.keys())
        for name in reference.keys():  # noqa: SIM118  no mapping
            array = reference.get_tensor(name)
            assert (entries[name].shape, entries[name].num_bytes) == (array.shape, array.nbytes)


@pytest.mark.parametrize("kept_fraction", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files_are_corrupt(good_file: Path, kept_fraction: float) -> None:
    raw = good_file.read_bytes()
    good_file.write_bytes(raw[: int(len(raw) * kept_fraction)])
    with pytest.raises(CorruptArtifact):
        read_header(good_file)


def test_bytes_after_the_last_tensor_are_corrupt(good_file: Path) -> None:
    good_file.write_bytes(good_file.read_bytes() + b"\0")
    with pytest.raises(CorruptArtifact, match="where the header promises"):
        read_header(good_file)


def tensor(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": {}, "a": {}}', "not valid JSON with unique keys"),
        ([], "no JSON object"),
        ({"a": None}, "has no description"),
        ({"a": tensor([1], 0, 4, "F33")}, "unknown dtype"),
        ({"a": tensor([1], 0, 4, ["F32"])}, "unknown dtype"),
        ({"a": tensor([-1], 0, 4)}, "invalid shape"),
        ({"a": tensor([True], 0, 4)}, "invalid shape"),
        ({"a": tensor([1] * 100, 0, 4)}, "invalid shape"),
        ({"a": tensor([1.0], 0, 4)}, "invalid shape"),
        ({"a": tensor([10**6, 10**6, 10**6], 0, 4)}, "needs 4000000000000000000 bytes and has 4"),
        ({"a": tensor([1], 4, 0)}, "needs 4 bytes and has -4"),
        ({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, "overlap or leave a hole"),
        ({"a": tensor([1], 4, 8)}, "overlap or leave a hole"),
        ({"a": tensor([2], 0, 8)}, "4 bytes of data where the header promises 8"),
    ],
)
def test_headers_that_contradict_themselves_are_corrupt(tmp_path: Path, header: Any, reason: str) -> None:
    with pytest.raises(CorruptArtifact, match=reason):
        read_header(write(tmp_path / "x.safetensors", header, b"1234"))


def test_a_header_of_100_megabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(100_000_008)
    with pytest.raises(CorruptArtifact, match="a header of 100000000 bytes"):
        read_header(path)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 2)
    header = {str(number): tensor([0], 0, 0) for number in range(3)}
    with pytest.raises(CorruptArtifact, match="3 tensors; at most 2"):
        read_header(write(tmp_path / "x.safetensors", header))


def test_messages_hold_no_path(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact) as caught:
        read_header(tmp_path / "absent.safetensors")
    assert str(tmp_path) not in caught.value.message
