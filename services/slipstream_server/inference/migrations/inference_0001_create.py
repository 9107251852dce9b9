"""Models, and the memory of requests."""

import sqlalchemy as sa
from alembic import op

from slipstream_server.storage.columns import UtcTime
from slipstream_server.storage.shared_tables import create_request_records_1

revision = "inference_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_request_records_1()
    op.create_table(
        "models",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("locator", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("by_operator", sa.Boolean(), nullable=False),
        sa.Column("at_start", sa.Boolean(), nullable=False),
        sa.Column("options_json", sa.Text(), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("wanted", sa.Boolean(), nullable=False),
        sa.Column("creating", sa.Boolean(), nullable=False),
        sa.Column("error_reason", sa.String(64), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("owns_folder", sa.Boolean(), nullable=False),
        sa.Column("resolved_source", sa.Text(), nullable=False),
        sa.Column("resolved_revision", sa.Text(), nullable=False),
        sa.Column("training_job", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("licence", sa.Text(), nullable=False),
        sa.Column("load_time", UtcTime(), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.Column("update_time", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
    )
    op.create_index("ix_models_owner", "models", ["owner"])
