"""Databases, migrations and artifacts: what a service keeps, and how it is kept whole.

Nothing here knows a service, a resource, gRPC or protobuf: each service's room declares its own tables and revisions
and hands them in. Everything public is asyncio; blocking work runs in threads.

How a room uses it::

    tables.py                   Rows(DeclarativeBase) with metadata = new_metadata(); its classes take the mixin Owned
                                requests = RequestRecords(Rows.metadata)         where its methods take a request_id
                                events = EventLog(Rows.metadata, "job_events")   where something is watched
                                SCHEMA = Schema(service="training", metadata=Rows.metadata, versions=<room>/migrations)
    migrations/                 training_0001_create.py, training_0002_priority.py, ...: one linear history; each has
                                revision, down_revision and upgrade(); shared tables are made by ``shared_tables``
    at start                    db = Database(config.database); await migrate(db, SCHEMA)
    in its tests                assert await drift(db, SCHEMA) == []: the revisions make what the tables declare
"""
