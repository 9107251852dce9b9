"""Artifacts to store in one call, and what is then to be found."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing

from slipstream_server.storage.artifact_drafts import Artifact
from slipstream_server.storage.artifact_manifest import ArtifactLimits
from slipstream_server.storage.artifacts import ArtifactStore

BIG = random.Random(7).randbytes(3 * 1024 * 1024 + 17)
FILES = {"adapter_config.json": b'{"r": 8}', "weights/adapter_model.safetensors": BIG, "empty": b""}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def expected_digest(files: dict[str, bytes]) -> str:
    entries = ",".join(
        f'"{path}":{{"sha256":"{sha256(data)}","size_bytes":{len(data)}}}' for path, data in sorted(files.items())
    )
    return sha256(f"{{{entries}}}".encode())


async def put(
    store: ArtifactStore,
    kind: str,
    files: Mapping[str, bytes | AsyncIterator[bytes]],
    limits: ArtifactLimits | None = None,
) -> Artifact:
    """Files of so many bytes, or of chunks as they come."""
    async with store.draft(kind, limits) as draft:
        for path, source in files.items():
            async with draft.file(path) as file:
                if isinstance(source, bytes):
                    await file.write(source)
                else:
                    async for chunk in source:
                        await file.write(chunk)
        return await draft.commit()


async def content(store: ArtifactStore, digest: str, path: str) -> bytes:
    async with aclosing(store.read(digest, path)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def stored_keys(store: ArtifactStore) -> list[str]:
    return await store.threads.run(lambda: [stored.key for stored in store.place.listed("")])


async def nothing_left(store: ArtifactStore) -> bool:
    blobs = [key for key in await stored_keys(store) if key.startswith(("blobs/", "manifests/"))]
    return blobs == [] and list(store.place.staging.iterdir()) == []
