"""What a database's failure means to a caller: out of space, not now, or a bug.

Knows the codes of SQLite and PostgreSQL, nothing of sessions. Pure functions; any thread.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
from pathlib import Path

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from slipstream_server.errors import DependencyUnavailable, SlipstreamError, StorageFull

OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})

_RETRY_AFTER_S = 1.0
# SQLite reports a full disk as SQLITE_FULL where it writes pages, but as an I/O or open error where it grows the WAL
# index or creates a file; with less than this left on the device, those mean the same.
_SQLITE_SPARE_BYTES = 64 * 1024
_SQLITE_SPACE_OR_DEVICE = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_SQLITE_NOT_NOW = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})

_POSTGRES_FULL = "53100"
# Classes: connection exceptions, insufficient resources, operator intervention (shutdown, statement timeout), system
# errors.
_POSTGRES_NOT_NOW_CLASSES = ("08", "53", "57", "58")
# Lock not available; idle or whole transaction timed out; serialization failure; deadlock.
_POSTGRES_NOT_NOW = frozenset({"55P03", "25P03", "25P04", "40001", "40P01"})


def named(failure: BaseException, folder: Path | None) -> SlipstreamError | None:
    """The error that ``failure`` means, or None where it is a bug or a broken constraint.

    ``folder`` is where a SQLite database lies, None for PostgreSQL.
    """
    if isinstance(failure, PoolTimeout):
        return _not_now()
    if isinstance(failure, DBAPIError):
        return _named_by_driver(failure, folder)
    if isinstance(failure, OSError):
        return full() if failure.errno in OUT_OF_SPACE else _not_now()
    return None


def full() -> StorageFull:
    return StorageFull(
        "the database has no space left; nothing of this request was stored", retry_after_s=_RETRY_AFTER_S
    )


def _not_now() -> DependencyUnavailable:
    return DependencyUnavailable("the database does not answer or is locked", retry_after_s=_RETRY_AFTER_S)


def _named_by_driver(failure: DBAPIError, folder: Path | None) -> SlipstreamError | None:
    driver_error = failure.orig
    sqlite_code = getattr(driver_error, "sqlite_errorcode", None)
    if isinstance(sqlite_code, int):
        return _named_by_sqlite(sqlite_code & 0xFF, folder)
    sqlstate = getattr(driver_error, "sqlstate", None)
    if isinstance(sqlstate, str):
        return _named_by_postgres(sqlstate)
    return _not_now() if failure.connection_invalidated else None


def _named_by_sqlite(primary_code: int, folder: Path | None) -> SlipstreamError | None:
    if primary_code == sqlite3.SQLITE_FULL:
        return full()
    if primary_code in _SQLITE_SPACE_OR_DEVICE:
        return full() if folder is not None and _is_full(folder) else _not_now()
    return _not_now() if primary_code in _SQLITE_NOT_NOW else None


def _named_by_postgres(sqlstate: str) -> SlipstreamError | None:
    if sqlstate == _POSTGRES_FULL:
        return full()
    if sqlstate in _POSTGRES_NOT_NOW or sqlstate.startswith(_POSTGRES_NOT_NOW_CLASSES):
        return _not_now()
    return None


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _SQLITE_SPARE_BYTES
    except OSError:
        return False
