"""Datasets, jobs, their attempts and checkpoints, events, and the memory of requests."""

import sqlalchemy as sa
from alembic import op

from slipstream_server.storage.columns import UtcTime
from slipstream_server.storage.shared_tables import create_event_log_1, create_request_records_1

revision = "training_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_request_records_1()
    create_event_log_1("job_events")
    _create_datasets()
    _create_jobs()
    _create_attempts()
    op.create_table(
        "checkpoints",
        sa.Column("job", sa.String(63), nullable=False),
        sa.Column("step", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Double(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("metrics_json", sa.Text(), nullable=False),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.PrimaryKeyConstraint("job", "step", name="pk_checkpoints"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_checkpoints_job_jobs", ondelete="CASCADE"),
    )
    op.create_table(
        "supervisors",
        sa.Column("one", sa.Boolean(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("one", name="pk_supervisors"),
    )


def _create_datasets() -> None:
    _create(
        "datasets",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("labels_json", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("error_reason", sa.String(64), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=False),
        sa.Column("artifact", sa.String(64), nullable=False),
        sa.Column("files_json", sa.Text(), nullable=False),
        sa.Column("wanted_format", sa.String(32), nullable=False),
        sa.Column("report_json", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_datasets"),
    )
    op.create_index("ix_datasets_state", "datasets", ["state"])
    op.create_index("ix_datasets_artifact", "datasets", ["artifact"])


def _create_jobs() -> None:
    _create(
        "jobs",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("labels_json", sa.Text(), nullable=False),
        sa.Column("dataset", sa.String(63), nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("plan_json", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("state_message", sa.Text(), nullable=False),
        sa.Column("error_json", sa.Text(), nullable=False),
        sa.Column("wish", sa.String(16), nullable=False),
        sa.Column("wish_grace_s", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("num_retries", sa.Integer(), nullable=False),
        sa.Column("progress_json", sa.Text(), nullable=False),
        sa.Column("outcome_json", sa.Text(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("start_time", UtcTime(), nullable=True),
        sa.Column("end_time", UtcTime(), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_index("ix_jobs_dataset", "jobs", ["dataset"])


def _create_attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("job", sa.String(63), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("mark", sa.String(32), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=True),
        sa.Column("process_start", sa.String(64), nullable=False),
        sa.Column("spool_offset", sa.BigInteger(), nullable=False),
        sa.Column("resumed_step", sa.BigInteger(), nullable=False),
        sa.Column("notes_json", sa.Text(), nullable=False),
        sa.Column("ending_json", sa.Text(), nullable=False),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.Column("end_time", UtcTime(), nullable=True),
        sa.PrimaryKeyConstraint("job", "number", name="pk_attempts"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_attempts_job_jobs", ondelete="CASCADE"),
    )


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
