"""One service's database: SQLite beside the service, or PostgreSQL by DSN, behind the same two verbs.

``write()`` is a transaction that is alone: SQLite's ``BEGIN IMMEDIATE``, PostgreSQL's transaction-scoped advisory
lock. What it reads cannot change before it commits, so read-modify-write needs no further care on either database, in
any number of processes. ``read()`` is a snapshot that cannot write. A write returns once it is on disk
(``synchronous=FULL``), or raises and leaves nothing.

Knows no table. Lives on the service's event loop; each SQLite connection has a thread of its own inside aiosqlite.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from slipstream_server.errors import InvalidField
from slipstream_server.storage import database_errors

Role = Literal["read", "write", "migrate"]

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
# The advisory lock that makes a PostgreSQL write transaction alone in its database ("slipstrm" in ASCII).
_WRITE_LOCK = 0x736C697073747260
_WAL_SIZE_LIMIT_BYTES = 16 * 1024 * 1024
_AFTER_COMMIT = "slipstream.after_commit"
_UNANSWERED = (DBAPIError, PoolTimeout, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseConfig:
    """Where the database is and how long to wait for it.

    ``dsn`` is ``sqlite:////absolute/file.db`` or ``postgresql://user:password@host:port/name``. ``lock_timeout_s``
    bounds every wait for another writer, ``connect_timeout_s`` for the server, ``statement_timeout_s`` each statement
    (PostgreSQL only).
    """

    dsn: str
    lock_timeout_s: float = 5.0
    connect_timeout_s: float = 5.0
    statement_timeout_s: float = 30.0
    migrate_timeout_s: float = 60.0
    max_readers: int = 4

    def __post_init__(self) -> None:
        for name in ("lock_timeout_s", "connect_timeout_s", "statement_timeout_s", "migrate_timeout_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise InvalidField.of(
                    f"database.{name}", f"{getattr(self, name)} is not above 0 and at most 3600 seconds"
                )
        if not 1 <= self.max_readers <= 64:
            raise InvalidField.of("database.max_readers", f"{self.max_readers} is not from 1 to 64")
        self.url()

    @classmethod
    def sqlite(cls, file: Path) -> DatabaseConfig:
        """The embedded default: one file."""
        return cls(dsn=URL.create("sqlite", database=str(file)).render_as_string())

    def url(self) -> URL:
        """The DSN for SQLAlchemy's async drivers."""
        try:
            url = make_url(self.dsn)
            driver = _DRIVERS[url.drivername]
        except (ArgumentError, KeyError, ValueError):
            raise InvalidField.of("database.dsn", "not a URL that begins with sqlite:/// or postgresql://") from None
        if driver.startswith("sqlite") and url.database in (None, "", ":memory:"):
            raise InvalidField.of("database.dsn", "an SQLite database needs a file: sqlite:////folder/file.db")
        return url.set(drivername=driver)


class Database:
    """The sessions of one database; see the module's docstring. Close it with ``close()``."""

    def __init__(self, config: DatabaseConfig) -> None:
        self.config = config
        self._url = config.url()
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self._folder = Path(self._url.database or "").absolute().parent if self.is_sqlite else None
        if self._folder is not None:
            with self._failures_named(OSError):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One writing connection: its pool is also the fair queue of this process's writers.
        self._writers = self._engine("write")
        self._readers = self._engine("read")

    async def close(self) -> None:
        await self._writers.dispose()
        await self._readers.dispose()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A transaction alone in the database; commits at the end of the block, rolls back when it raises.

        Do not wait for anything but the database inside, and do not open a second one inside: both block every other
        writer.

        Raises:
            StorageFull: no space; nothing was stored and reads go on.
            DependencyUnavailable: locked for longer than ``lock_timeout_s``, or the server is away.
        """
        async with self._transaction(self._writers) as session:
            yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A read-only snapshot. Raises DependencyUnavailable as ``write`` does."""
        async with self._transaction(self._readers) as session:
            yield session

    @asynccontextmanager
    async def migrating(self) -> AsyncIterator[AsyncSession]:
        """``write()`` for schema changes: waits longer; SQLite's foreign keys are the caller's to check."""
        engine = self._engine("migrate")
        try:
            async with self._transaction(engine) as session:
                yield session
        finally:
            await engine.dispose()

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine, expire_on_commit=False) as session:
            with self._failures_named(*_UNANSWERED):
                await session.connection()
            with self._failures_named(DBAPIError, ConnectionError):
                yield session
            with self._failures_named(*_UNANSWERED):
                await _uninterrupted(_commit(session))

    @contextmanager
    def _failures_named(self, *kinds: type[Exception]) -> Iterator[None]:
        try:
            yield
        except kinds as failure:
            error = database_errors.named(failure, self._folder)
            if error is None:
                raise
            raise error from failure

    def _engine(self, role: Role) -> AsyncEngine:
        options: dict[str, Any] = {"poolclass": NullPool}
        if role != "migrate":
            size = 1 if role == "write" else self.config.max_readers
            options = {"pool_size": size, "max_overflow": 0, "pool_timeout": self.config.lock_timeout_s}
        return self._sqlite_engine(role, options) if self.is_sqlite else self._postgres_engine(role, options)

    def _sqlite_engine(self, role: Role, options: dict[str, Any]) -> AsyncEngine:
        engine = create_async_engine(self._url, connect_args={"factory": _LockReturning}, **options)
        lock_timeout_ms = round(1000 * self._lock_timeout_s(role))

        @event.listens_for(engine.sync_engine, "connect")
        def on_connect(connection: DBAPIConnection, _record: object) -> None:
            _prepare_sqlite(connection, role, lock_timeout_ms)

        @event.listens_for(engine.sync_engine, "begin")
        def on_begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN" if role == "read" else "BEGIN IMMEDIATE")

        return engine

    def _postgres_engine(self, role: Role, options: dict[str, Any]) -> AsyncEngine:
        lock_timeout_ms = round(1000 * self._lock_timeout_s(role))
        statement_timeout_s = max(self.config.statement_timeout_s, self._lock_timeout_s(role) + 1)
        settings = {
            "application_name": "slipstream",
            "lock_timeout": str(lock_timeout_ms),
            "statement_timeout": str(round(1000 * statement_timeout_s)),
            # A stopped process must not hold the write lock for ever.
            "idle_in_transaction_session_timeout": str(round(1000 * self.config.statement_timeout_s)),
        }
        engine = create_async_engine(
            self._url,
            connect_args={"server_settings": settings, "timeout": self.config.connect_timeout_s},
            pool_pre_ping=role != "migrate",
            **options,
        )
        if role == "read":
            return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

        @event.listens_for(engine.sync_engine, "begin")
        def on_begin(connection: Connection) -> None:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITE_LOCK})")

        return engine

    def _lock_timeout_s(self, role: Role) -> float:
        return self.config.migrate_timeout_s if role == "migrate" else self.config.lock_timeout_s


def after_commit(session: AsyncSession, callback: Callable[[], None]) -> None:
    """Run ``callback`` once the write transaction of ``session`` is on disk; not at all when it rolls back."""
    session.info.setdefault(_AFTER_COMMIT, []).append(callback)


class _LockReturning(sqlite3.Connection):
    """Gives its lock back when it is closed. SQLite itself waits for statements that nobody has read to their end, and
    those of a task that was cancelled live on in its traceback.
    """

    def close(self) -> None:
        if self.in_transaction:
            self.rollback()
        super().close()


def _prepare_sqlite(connection: DBAPIConnection, role: Role, lock_timeout_ms: int) -> None:
    # The driver's own BEGIN is deferred: two read-modify-writes would lose one update silently. We begin ourselves.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={lock_timeout_ms}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA journal_size_limit={_WAL_SIZE_LIMIT_BYTES}")
    # Rebuilding a table would cascade into the tables that refer to it; migrations check the keys at their end instead.
    cursor.execute(f"PRAGMA foreign_keys={'OFF' if role == 'migrate' else 'ON'}")
    cursor.execute(f"PRAGMA query_only={'ON' if role == 'read' else 'OFF'}")
    cursor.close()


async def _commit(session: AsyncSession) -> None:
    await session.commit()
    for callback in session.info.get(_AFTER_COMMIT, ()):
        callback()


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` to its end even when cancelled: a commit that has begun also tells those who wait for it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen: the caller is gone, and asyncio would complain that nobody looked
        raise
