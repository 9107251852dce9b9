"""Revision steps that make the shared tables, called from the ``upgrade()`` of a service's revision.

A step never changes once a release has run it: an altered table gets a further step with the next number. ``drift()``
in each service's tests says whether the steps still make what ``RequestRecords`` and ``EventLog`` declare.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from slipstream_server.storage.columns import UtcTime


def create_request_records_1() -> None:
    """The table of ``RequestRecords``."""
    op.create_table(
        "request_records",
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("method", sa.String(128), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=True),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.Column("expire_time", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "method", "request_id", name="pk_request_records"),
    )
    op.create_index("ix_request_records_expire_time", "request_records", ["expire_time"])


def create_event_log_1(name: str) -> None:
    """The two tables of ``EventLog(metadata, name)``."""
    op.create_table(
        name,
        sa.Column("stream", sa.String(255), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("time", UtcTime(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("stream", "sequence", name=f"pk_{name}"),
    )
    op.create_table(
        f"{name}_heads",
        sa.Column("stream", sa.String(255), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("stream", name=f"pk_{name}_heads"),
    )
