"""Reads and checks the header of a safetensors file, never its tensors.

A header is data from a stranger: its length, number of tensors, shapes and offsets are bounded and must add up to
exactly the file's length, so that a truncated or padded file is found before anything maps it. Knows nothing of models.
Plain functions that block on the disk; any thread.

Format: 8 bytes little-endian length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}``, then the tensors
without holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream_server.errors import CorruptArtifact

MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 16

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as the header describes it; ``dtype`` in safetensors spelling (``BF16``)."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> Mapping[str, TensorEntry]:
    """The tensors of the safetensors file at ``path``; raises CorruptArtifact when header and file do not agree."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(8)
            header = file.read(header_length(path.name, prefix, file_bytes))
    except OSError as error:
        raise CorruptArtifact(f"{path.name}: cannot be read ({error.strerror})") from error
    return parse_header(path.name, header, file_bytes)


def parse_header(name: str, header: bytes, file_bytes: int) -> Mapping[str, TensorEntry]:
    """The tensors in the JSON ``header`` of a file of ``file_bytes``, called ``name`` in errors; raises as above."""
    return _entries(name, _parse(name, header), file_bytes - 8 - len(header))


def header_length(name: str, prefix: bytes, file_bytes: int) -> int:
    """The length of the JSON that follows the 8 bytes ``prefix``; raises CorruptArtifact where it cannot be."""
    if len(prefix) < 8:
        raise CorruptArtifact(f"{name}: {file_bytes} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CorruptArtifact(f"{name}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if 8 + length > file_bytes:
        raise CorruptArtifact(f"{name}: truncated within its header ({file_bytes} of at least {8 + length} bytes)")
    return int(length)


def _parse(name: str, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{name}: the header is not valid JSON with unique keys") from error
    if not isinstance(header, dict):
        raise CorruptArtifact(f"{name}: the header is no JSON object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CorruptArtifact(f"{name}: {len(header)} tensors; at most {MAX_TENSORS} are read")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("duplicate keys")
    return unique


def _entries(name: str, header: dict[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    spans: list[tuple[int, int]] = []
    entries: dict[str, TensorEntry] = {}
    for tensor, description in header.items():
        entries[tensor], span = _entry(f"{name}: tensor {tensor[:100]!r}", description)
        spans.append(span)
    _check_spans(name, sorted(spans), data_bytes)
    return entries


def _entry(where: str, description: Any) -> tuple[TensorEntry, tuple[int, int]]:
    if not isinstance(description, dict):
        raise CorruptArtifact(f"{where} has no description")
    dtype: Any = description.get("dtype")
    shape: Any = description.get("shape")
    offsets: Any = description.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CorruptArtifact(f"{where} has an unknown dtype")
    if not _are_counts(shape, MAX_DIMENSIONS) or not _are_counts(offsets, 2) or len(offsets) != 2:
        raise CorruptArtifact(f"{where} has an invalid shape or invalid offsets")
    num_bytes = (math.prod(shape) * _BITS[dtype] + 7) // 8
    if offsets[1] - offsets[0] != num_bytes:
        raise CorruptArtifact(f"{where} of shape {shape} needs {num_bytes} bytes and has {offsets[1] - offsets[0]}")
    return TensorEntry(dtype=dtype, shape=tuple(shape), num_bytes=num_bytes), (offsets[0], offsets[1])


def _are_counts(value: Any, max_length: int) -> bool:
    return (
        isinstance(value, list) and len(value) <= max_length and all(type(item) is int and item >= 0 for item in value)
    )


def _check_spans(name: str, spans: list[tuple[int, int]], data_bytes: int) -> None:
    position = 0
    for begin, end in spans:
        if begin != position:
            raise CorruptArtifact(f"{name}: tensors overlap or leave a hole at byte {position} of the data")
        position = end
    if position != data_bytes:
        raise CorruptArtifact(f"{name}: {data_bytes} bytes of data where the header promises {position}")
