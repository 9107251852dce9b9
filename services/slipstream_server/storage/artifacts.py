"""The content-addressed store of artifacts: datasets, checkpoints, adapters, exported models.

An artifact is written through a draft (``artifact_drafts``), named by its digest (``artifact_manifest``), and kept in
a place (``artifact_places``): ``file://`` or ``s3://``. It never changes; it goes when the collector (``garbage``)
finds that nothing refers to it. A root belongs to one service, the one whose database refers to its digests; others
read it.

Public methods are for the event loop and do their blocking work in the store's threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from slipstream_server.errors import (
    CorruptArtifact,
    InvalidField,
    MissingDependency,
    NotFound,
    QuotaExceeded,
    SlipstreamError,
)
from slipstream_server.storage.artifact_drafts import ArtifactDraft, blob_key, manifest_key
from slipstream_server.storage.artifact_manifest import (
    MAX_MANIFEST_BYTES,
    ArtifactLimits,
    FileEntry,
    Manifest,
    check_kind,
    check_sha256,
)
from slipstream_server.storage.artifact_places import LocalPlace, ObjectPlace, Place
from slipstream_server.storage.blocking import BlockingThreads


class ArtifactStore:
    """Artifacts by digest. Make one with ``open_store``; close it with ``close()``."""

    def __init__(self, place: Place, limits: ArtifactLimits | None = None) -> None:
        self.place = place
        self.limits = limits or ArtifactLimits()
        self.threads = BlockingThreads("artifacts")

    def close(self) -> None:
        self.threads.close()

    def draft(self, kind: str, limits: ArtifactLimits | None = None) -> ArtifactDraft:
        """A new artifact of ``kind``, to be written file by file; see ``artifact_drafts``."""
        return ArtifactDraft(check_kind(kind), limits or self.limits, self.place, self.threads)

    async def manifest(self, digest: str) -> Manifest:
        """Raises NotFound where there is no such artifact, CorruptArtifact where its manifest is damaged."""
        return Manifest.from_bytes(await self._manifest_bytes(digest), digest)

    async def digests(self) -> tuple[str, ...]:
        """Every artifact in the store, sorted."""
        found = await self.threads.run(lambda: [stored.key for stored in self.place.listed("manifests")])
        return tuple(sorted(key.rpartition("/")[2] for key in found))

    async def read(self, digest: str, path: str) -> AsyncGenerator[bytes, None]:
        """The bytes of one file in chunks of at most 1 MiB; the last comes after the whole file's hash was found right.

        Raises CorruptArtifact where it is not, NotFound where there is no such artifact, InvalidField no such file.
        """
        entry = (await self.manifest(digest)).entry(path)
        async with aclosing(self._verified_chunks(entry, f"{path!r} of artifact {digest}")) as chunks:
            async for chunk in chunks:
                yield chunk

    async def read_bytes(self, digest: str, path: str, max_bytes: int) -> bytes:
        """The bytes of a small file, checked. Raises as ``read``, and QuotaExceeded over ``max_bytes``."""
        size_bytes = (await self.manifest(digest)).entry(path).size_bytes
        if size_bytes > max_bytes:
            raise QuotaExceeded(
                f"{path!r} of artifact {digest} has {size_bytes} bytes, at most {max_bytes} are read at once"
            )
        async with aclosing(self.read(digest, path)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def verify(self, digest: str) -> Manifest:
        """Read every byte of the artifact again. Raises CorruptArtifact for a file that is not as it was."""
        manifest = await self.manifest(digest)
        for path, entry in manifest.files.items():
            await self.threads.run(self._check, entry, f"{path!r} of artifact {digest}")
        return manifest

    async def touch(self, digest: str) -> None:
        """Keep the artifact a grace period more: a row is about to refer to it. Raises NotFound where it is gone."""
        data = await self._manifest_bytes(digest)
        with _missing_is(_no_artifact(digest)):
            await self.threads.run(self.place.touch, manifest_key(digest), data)

    async def materialize(self, digest: str, cache: Path) -> Path:
        """A folder ``cache/<digest>`` with the artifact's files, hashed on the way; made once, whole or not at all.

        The files are read-only and may be hard links into the store: read them, never write them. Raises as ``read``,
        and StorageFull.
        """
        manifest = await self.manifest(digest)
        return await self.threads.run(self._materialize, digest, manifest, cache)

    async def _manifest_bytes(self, digest: str) -> bytes:
        check_sha256(digest, "digest")
        with _missing_is(_no_artifact(digest)):
            return await self.threads.run(self._read_manifest, digest)

    def _read_manifest(self, digest: str) -> bytes:
        data = b""
        for chunk in self.place.chunks(manifest_key(digest)):
            data += chunk
            if len(data) > MAX_MANIFEST_BYTES:
                raise CorruptArtifact(f"the manifest of artifact {digest} is over {MAX_MANIFEST_BYTES} bytes")
        return data

    async def _verified_chunks(self, entry: FileEntry, what: str) -> AsyncGenerator[bytes, None]:
        steps = self._checked(entry, what)
        try:
            while chunk := await self.threads.run(next, steps, b""):
                yield chunk
        finally:
            await self.threads.run(steps.close)

    def _checked(self, entry: FileEntry, what: str) -> Generator[bytes, None, None]:
        """The chunks of a blob, the last one only after the hash of all was found right. Blocks."""
        sha256, held = hashlib.sha256(), b""
        with _missing_is(CorruptArtifact(f"{what} is missing in the store")):
            for chunk in self.place.chunks(blob_key(entry.sha256)):
                sha256.update(chunk)
                if held:
                    yield held
                held = chunk
        if sha256.hexdigest() != entry.sha256:
            raise CorruptArtifact(f"{what} is damaged in the store: its SHA-256 is {sha256.hexdigest()}")
        if held:
            yield held

    def _check(self, entry: FileEntry, what: str) -> None:
        for _ in self._checked(entry, what):
            pass

    def _materialize(self, digest: str, manifest: Manifest, cache: Path) -> Path:
        made = cache / digest
        if _looks_whole(made, manifest):
            return made
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        incoming = Path(tempfile.mkdtemp(prefix=".incoming-", dir=cache))
        try:
            for path, entry in manifest.files.items():
                self._materialize_file(incoming / path, entry, f"{path!r} of artifact {digest}")
            _put_in_place(incoming, made, manifest)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return made

    def _materialize_file(self, target: Path, entry: FileEntry, what: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _missing_is(CorruptArtifact(f"{what} is missing in the store")):
            linked = self.place.link(blob_key(entry.sha256), target)
        if linked:
            self._check(entry, what)
            return
        with open(target, "xb") as file:
            for chunk in self._checked(entry, what):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(target, 0o444)


def open_store(
    root: str,
    *,
    staging: Path | None = None,
    limits: ArtifactLimits | None = None,
    options: Mapping[str, Any] | None = None,
) -> ArtifactStore:
    """The store at ``root``: a folder, ``file://`` and its absolute path, or ``s3://bucket/prefix``.

    ``root`` and ``options`` come from the service's configuration, never from a client. An object store needs
    ``staging``, a local folder for what is being uploaded; ``options`` go to fsspec's filesystem (endpoint, region,
    credentials).
    """
    scheme = urlsplit(root).scheme
    if scheme in ("", "file"):
        return ArtifactStore(LocalPlace(_local_root(root)), limits)
    if scheme != "s3":
        raise InvalidField.of("artifacts.root", f"{scheme[:20]!a}:// is neither file:// nor s3://")
    if staging is None:
        raise InvalidField.of("artifacts.staging", "an object store needs a local folder for uploads in progress")
    return ArtifactStore(
        ObjectPlace(_object_filesystem(scheme, options or {}), root.removeprefix("s3://"), staging), limits
    )


def _no_artifact(digest: str) -> NotFound:
    return NotFound(f"there is no artifact {digest} in the store")


def _local_root(root: str) -> Path:
    parts = urlsplit(root)
    if parts.scheme == "":
        return Path(root)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise InvalidField.of("artifacts.root", "a file:// root is file:// and an absolute path")
    return Path(unquote(parts.path))


def _object_filesystem(scheme: str, options: Mapping[str, Any]) -> Any:
    try:
        # Listings are never cached: the collector must see what other processes wrote.
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    except ImportError:
        raise MissingDependency("artifacts on s3:// need the package s3fs: pip install 'slipstream[s3]'") from None


@contextmanager
def _missing_is(error: SlipstreamError) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise error from None


def _looks_whole(folder: Path, manifest: Manifest) -> bool:
    """Whether ``folder`` holds every file in its right length; their bytes were hashed when it was made."""
    try:
        return all((folder / path).lstat().st_size == entry.size_bytes for path, entry in manifest.files.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _put_in_place(incoming: Path, made: Path, manifest: Manifest) -> None:
    try:
        incoming.rename(made)
    except OSError:
        if _looks_whole(made, manifest):
            return  # another process made it meanwhile
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=made.parent) as damaged:
            made.rename(Path(damaged, "damaged"))
            incoming.rename(made)
