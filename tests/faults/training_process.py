"""A training service as a process of its own: ``python -m tests.faults.training_process FOLDER MODEL CONTROL``.

Jobs are run by the fake runner. What is registered is kept in files of the folder, so that it outlives the process.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from tests.rpc.training_kit import GIB, Bench

from slipstream_server.config import ListenConfig
from slipstream_server.logs import configure_logging
from slipstream_server.rpc.service_runner import announce, run_service
from slipstream_server.rpc.training.app import Workshop, build, opened_store
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate
from slipstream_server.training.base_models import BaseModels
from slipstream_server.training.publishing import AdapterUpload, PublishedVersion
from slipstream_server.training.resources import AliasOutcome
from slipstream_server.training.specification import Publication
from slipstream_server.training.tables import SCHEMA


class FileRegistry:
    """One file for each request id; it answers an upload only while there is no file ``registry-hold``."""

    def __init__(self, control: Path) -> None:
        self._control = control

    async def base_of(self, adapter: str) -> str:
        return ""

    async def upload(self, upload: AdapterUpload) -> PublishedVersion:
        folder = self._control / "versions"
        folder.mkdir(exist_ok=True)
        known = folder / upload.request_id
        if not known.exists():
            known.write_text(json.dumps(f"adapters/{upload.adapter}/versions/v{len(list(folder.iterdir())) + 1}"))
        while (self._control / "registry-hold").exists():
            await asyncio.sleep(0.01)
        return PublishedVersion(json.loads(known.read_text()), "sha256:" + "0" * 64)

    async def set_alias(self, publication: Publication, version: str, request_id: str) -> AliasOutcome:
        return AliasOutcome(alias=f"adapters/{publication.adapter}/aliases/{publication.alias}", moved=True)


@asynccontextmanager
async def workshop(bench: Bench):  # type: ignore[no-untyped-def]
    database = Database(DatabaseConfig.sqlite(bench.folder / "training.db"))
    try:
        await migrate(database, SCHEMA)
        async with opened_store(None, bench.folder) as store:
            yield Workshop(
                database=database,
                store=store,
                registry=FileRegistry(bench.control),
                models=BaseModels({"tiny": str(bench.model)}, ()),
                folder=bench.folder,
                shared=bench.folder,
                capacity_bytes={"cpu": 64 * GIB},
                command=bench.command,
            )
    finally:
        await database.close()


async def main(folder: Path, model: Path, control: Path) -> int:
    configure_logging()
    bench = Bench(folder=folder, model=model, control=control)
    async with workshop(bench) as made:
        return await run_service(
            build(made),
            ListenConfig(drain_grace_s=1.0),
            on_serving=lambda server: announce("training", "127.0.0.1", server),
        )


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*map(Path, sys.argv[1:4]))))
