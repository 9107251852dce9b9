"""What Alembic runs for every service: the revisions, inside the transaction that the caller has open.

The caller puts ``connection`` and ``metadata`` into the configuration's attributes; see ``storage/migrations.py``.
"""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=context.config.attributes["metadata"],
    # SQLite alters a table by rebuilding it.
    render_as_batch=True,
    # Its DDL is transactional as long as nobody but us begins and commits, which Alembic does not assume.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
