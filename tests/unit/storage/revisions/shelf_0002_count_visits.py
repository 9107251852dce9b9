"""Shelves count their visits. Rebuilds a table that others refer to, which SQLite must survive."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "shelf_0002"
down_revision = "shelf_0001"


def upgrade() -> None:
    with op.batch_alter_table(
        "shelves", recreate="always" if op.get_bind().dialect.name == "sqlite" else "auto"
    ) as shelves:
        shelves.add_column(sa.Column("num_visits", sa.BigInteger(), nullable=False, server_default="0"))
