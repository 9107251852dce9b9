"""Puts the adapter service together: database, store, registry, servicer, housekeeping."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream_server.adapters.active import ActiveAdapters
from slipstream_server.adapters.adapters import Adapters
from slipstream_server.adapters.aliases import Aliases
from slipstream_server.adapters.housekeeping import Housekeeping
from slipstream_server.adapters.intake import LIMITS, Intake
from slipstream_server.adapters.journal import Journal
from slipstream_server.adapters.resolvers import Resolvers
from slipstream_server.adapters.tables import SCHEMA
from slipstream_server.adapters.versions import Versions
from slipstream_server.adapters.watching import Watching
from slipstream_server.config import Settings
from slipstream_server.rpc.adapters.convert import encode_change
from slipstream_server.rpc.adapters.files import Downloads, Uploads
from slipstream_server.rpc.adapters.servicer import AdapterServicer, Registry
from slipstream_server.rpc.server import Mount
from slipstream_server.rpc.service_runner import Service, announce, run_service
from slipstream_server.storage.artifacts import ArtifactStore, open_store
from slipstream_server.storage.database import Database, DatabaseConfig
from slipstream_server.storage.migrations import migrate


async def run(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code."""
    folder = settings.common.data_dir / "adapters"
    config = _database_config(settings.adapters.database_url, folder)
    url = settings.adapters.artifacts_url
    async with open_database(config) as database, opened_store(url, folder) as store:
        registry = open_registry(database, store, settings.adapters.acknowledge_timeout_s)
        service = Service(
            name="adapters",
            mounts=[mount(registry)],
            background={"housekeeping": Housekeeping(database, store).run},
        )
        return await run_service(
            service,
            settings.listen("adapters"),
            on_serving=lambda server: announce("adapters", settings.common.host, server),
        )


def open_registry(database: Database, store: ArtifactStore, acknowledge_timeout_s: float = 5.0) -> Registry:
    """The rooms of the service over one database and one store."""
    journal = Journal(encode_change)
    versions = Versions(database, journal)
    return Registry(
        adapters=Adapters(database, journal),
        versions=versions,
        aliases=Aliases(database, journal),
        active=ActiveAdapters(database, journal),
        watching=Watching(database),
        resolvers=Resolvers(),
        uploads=Uploads(Intake(store), versions),
        downloads=Downloads(store, versions),
        acknowledge_timeout_s=acknowledge_timeout_s,
    )


def mount(registry: Registry) -> Mount:
    """The service as the server kit takes it."""
    return Mount(adapter_grpc.add_AdapterServiceServicer_to_server, AdapterServicer(registry))


@asynccontextmanager
async def open_database(config: DatabaseConfig) -> AsyncIterator[Database]:
    """The database, brought to this build's schema."""
    database = Database(config)
    try:
        await migrate(database, SCHEMA)
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def opened_store(url: str | None, folder: Path) -> AsyncIterator[ArtifactStore]:
    """The store at ``url``, or in the service's own folder."""
    store = open_store(url or str(folder / "artifacts"), staging=folder / "staging", limits=LIMITS)
    try:
        yield store
    finally:
        store.close()


def _database_config(url: str | None, folder: Path) -> DatabaseConfig:
    return DatabaseConfig.sqlite(folder / "adapters.db") if url is None else DatabaseConfig(dsn=url)
