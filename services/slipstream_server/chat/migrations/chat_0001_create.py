"""Conversations, messages, and the memory of requests."""

import sqlalchemy as sa
from alembic import op

from slipstream_server.storage.columns import UtcTime
from slipstream_server.storage.shared_tables import create_request_records_1

revision = "chat_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_request_records_1()
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("adapter", sa.Text(), nullable=False),
        sa.Column("system_message", sa.Text(), nullable=False),
        sa.Column("labels_json", sa.Text(), nullable=False),
        sa.Column("num_messages", sa.BigInteger(), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        *_owned(),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
    )
    op.create_index("ix_conversations_owner", "conversations", ["owner"])
    op.create_table(
        "messages",
        sa.Column("conversation", sa.String(63), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("extra", sa.LargeBinary(), nullable=False),
        sa.Column("finish_reason", sa.String(32), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("adapter_version", sa.Text(), nullable=False),
        sa.Column("writer", sa.String(32), nullable=False),
        *_owned(),
        sa.PrimaryKeyConstraint("conversation", "sequence", name="pk_messages"),
        sa.ForeignKeyConstraint(
            ["conversation"], ["conversations.id"], name="fk_messages_conversation_conversations", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_messages_owner", "messages", ["owner"])
    op.create_index("ix_messages_state", "messages", ["state"])


def _owned() -> list[sa.Column[object]]:
    return [
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("create_time", UtcTime(), nullable=False),
        sa.Column("update_time", UtcTime(), nullable=False),
    ]
