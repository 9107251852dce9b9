"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from slipstream_server.storage.columns import UtcTime
from slipstream_server.storage.shared_tables import create_event_log_1, create_request_records_1

revision = "shelf_0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "shelves",
        sa.Column("shelf_id", sa.String(63), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.Column("update_time", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("shelf_id", name="pk_shelves"),
    )
    op.create_index("ix_shelves_owner", "shelves", ["owner"])
    op.create_table(
        "books",
        sa.Column("book_id", sa.String(63), nullable=False),
        sa.Column("shelf_id", sa.String(63), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.Column("update_time", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("book_id", name="pk_books"),
        sa.ForeignKeyConstraint(["shelf_id"], ["shelves.shelf_id"], name="fk_books_shelf_id_shelves"),
    )
    op.create_index("ix_books_owner", "books", ["owner"])
    create_request_records_1()
    create_event_log_1("shelf_events")
