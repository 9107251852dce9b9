"""The databases of the storage tests, for the registry's tables."""

from __future__ import annotations

from tests.unit.storage.conftest import dsn, postgres

__all__ = ["dsn", "postgres"]
