"""Brings a service's database to the schema this build speaks, and refuses one that a newer build has written.

A service hands in its ``Schema``: its tables and the folder of its Alembic revisions, which ship inside the package.
Revision ids begin with the service's name (``chat_0001``), so that a database of another service is told from a newer
one. All steps of one start are one write transaction: processes that start at once take turns, and a failed upgrade
leaves the old schema.

Runs once, at start, on the service's event loop.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData

from slipstream_server.errors import SchemaTooNew, WrongState
from slipstream_server.storage.database import Database

_SCRIPT_FOLDER = Path(__file__).parent / "migration_script"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One service's tables and the folder of the revisions that make them."""

    service: str
    metadata: MetaData
    versions: Path

    def script(self) -> ScriptDirectory:
        return ScriptDirectory.from_config(self._config())

    def _config(self, connection: Connection | None = None) -> Config:
        config = Config()
        # Config values are %-interpolated and version_locations is split at the separator; attributes are taken as
        # they are.
        config.set_main_option("script_location", _literal(_SCRIPT_FOLDER))
        config.set_main_option("path_separator", "newline")
        config.set_main_option("version_locations", _literal(self.versions))
        config.attributes["connection"] = connection
        config.attributes["metadata"] = self.metadata
        return config

    def upgrade(self, connection: Connection, revision: str = "head") -> None:
        """Apply what is missing inside the transaction that ``connection`` has open."""
        command.upgrade(self._config(connection), revision)


async def migrate(database: Database, schema: Schema) -> str:
    """Upgrade ``database`` to the newest revision of ``schema`` and return that revision.

    Raises:
        SchemaTooNew: a newer build has upgraded it; nothing was changed.
        WrongState: the database belongs to another service.
        StorageFull, DependencyUnavailable: as for any write; the old schema stands.
    """
    async with database.migrating() as session:
        connection = await session.connection()
        return await connection.run_sync(_upgrade, schema)


async def drift(database: Database, schema: Schema) -> list[str]:
    """What differs between the migrated ``database`` and the tables that ``schema`` declares; empty when they agree."""
    async with database.read() as session:
        connection = await session.connection()
        return await connection.run_sync(_differences, schema.metadata)


def _upgrade(connection: Connection, schema: Schema) -> str:
    script = schema.script()
    newest = script.get_current_head()
    if newest is None:
        raise WrongState(f"the service {schema.service} ships no revisions of its database")
    current = MigrationContext.configure(connection).get_current_revision()
    _check_known(current, {revision.revision for revision in script.walk_revisions()}, schema.service)
    if current != newest:
        logger.info("database of %s: upgrading from %s to %s", schema.service, current or "nothing", newest)
        schema.upgrade(connection)
        _check_foreign_keys(connection, schema.service)
    return newest


def _check_known(current: str | None, known: set[str], service: str) -> None:
    if current is None or current in known:
        return
    if not current.startswith(f"{service}_"):
        raise WrongState(f"the database has the schema {current!r}, which is not one of the service {service}")
    raise SchemaTooNew(
        f"the database has the schema {current!r}, newer than this build: use the one that wrote it, or a newer one",
        metadata={"schema": current},
    )


def _check_foreign_keys(connection: Connection, service: str) -> None:
    if (
        connection.dialect.name == "sqlite"
        and connection.exec_driver_sql("PRAGMA foreign_key_check").first() is not None
    ):
        raise WrongState(
            f"upgrading the database of {service} would leave rows that refer to nothing; it was left as it was"
        )


def _differences(connection: Connection, metadata: MetaData) -> list[str]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    return [repr(difference) for difference in compare_metadata(context, metadata)]


def _literal(path: Path) -> str:
    return str(path).replace("%", "%%")
