"""Adapters, versions, aliases, active adapters, the registry's events, and the memory of requests."""

import sqlalchemy as sa
from alembic import op

from slipstream_server.storage.columns import UtcTime
from slipstream_server.storage.shared_tables import create_event_log_1, create_request_records_1

revision = "adapters_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_request_records_1()
    create_event_log_1("registry_events")
    _create(
        "adapters",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("deleted", sa.Boolean(), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("labels_json", sa.Text(), nullable=False),
        sa.Column("last_number", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
    )
    _create(
        "versions",
        sa.Column("adapter", sa.String(63), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("state_message", sa.Text(), nullable=False),
        sa.Column("error_reason", sa.String(64), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("files_json", sa.Text(), nullable=False),
        sa.Column("facts_json", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("base_model_revision", sa.Text(), nullable=False),
        sa.Column("provenance_json", sa.Text(), nullable=False),
        sa.Column("metrics_json", sa.Text(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "number", name="pk_versions"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.id"], name="fk_versions_adapter_adapters"),
    )
    op.create_index("ix_versions_digest", "versions", ["digest"])
    _create(
        "aliases",
        sa.Column("adapter", sa.String(63), nullable=False),
        sa.Column("alias", sa.String(63), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("gate_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "alias", name="pk_aliases"),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.id"], name="fk_aliases_adapter_adapters"),
    )
    op.create_table(
        "alias_positions",
        sa.Column("adapter", sa.String(63), nullable=False),
        sa.Column("alias", sa.String(63), nullable=False),
        sa.Column("generation", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("set_time", UtcTime(), nullable=False),
        sa.Column("set_by", sa.String(255), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("gate_overridden", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "alias", "generation", name="pk_alias_positions"),
        sa.ForeignKeyConstraint(
            ["adapter", "alias"], ["aliases.adapter", "aliases.alias"], name="fk_alias_positions_adapter_alias_aliases"
        ),
    )
    _create(
        "active_adapters",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("adapter", sa.Text(), nullable=False),
        sa.Column("adapter_id", sa.String(63), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=True),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_active_adapters"),
    )
    op.create_index("ix_active_adapters_adapter_id", "active_adapters", ["adapter_id"])


def _create(name: str, *columns: sa.schema.SchemaItem) -> None:
    """A table of owned resources."""
    op.create_table(
        name,
        *columns,
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.Column("update_time", UtcTime(), nullable=False),
    )
    op.create_index(f"ix_{name}_owner", name, ["owner"])
