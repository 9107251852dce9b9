"""Puts the training service together: database, store, queue, supervisor, servicers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from slipstream.training.v1 import dataset_service_pb2_grpc as dataset_grpc
from slipstream.training.v1 import training_service_pb2_grpc as training_grpc
from slipstream_server.config import Settings
from slipstream_server.models.devices import device_memory
from slipstream_server.rpc.channels import Peer, open_channel
from slipstream_server.rpc.chat.app import database_config
from slipstream_server.rpc.inference.app import wanted_models
from slipstream_server.rpc.server import Mount
from slipstream_server.rpc.service_runner import Service, announce, run_service
from slipstream_server.rpc.training.convert import encode_event
from slipstream_server.rpc.training.datasets import DatasetRooms, DatasetServicer
from slipstream_server.rpc.training.jobs import JobRooms, TrainingServicer
from slipstream_server.rpc.training.registry import AdapterRegistry
from slipstream_server.storage.artifacts import ArtifactStore, open_store
from slipstream_server.storage.database import Database
from slipstream_server.storage.device_ledger import DeviceLedger
from slipstream_server.storage.migrations import migrate
from slipstream_server.training.base_models import BaseModels
from slipstream_server.training.checking import Checking
from slipstream_server.training.dataset_intake import DatasetIntake
from slipstream_server.training.datasets import Datasets
from slipstream_server.training.fence import Fence
from slipstream_server.training.housekeeping import Housekeeping, Places
from slipstream_server.training.job_run import Command, Surroundings
from slipstream_server.training.jobs import Jobs
from slipstream_server.training.journal import Journal
from slipstream_server.training.process_tree import runner_command
from slipstream_server.training.publishing import Publisher, Registry
from slipstream_server.training.spool_intake import SpoolIntake
from slipstream_server.training.supervisor import Supervisor
from slipstream_server.training.tables import SCHEMA
from slipstream_server.training.validation import JobValidator, Validation


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What the service is made of. ``folder`` is its own, ``shared`` holds the ledger of the machine's devices."""

    database: Database
    store: ArtifactStore
    registry: Registry
    models: BaseModels
    folder: Path
    shared: Path
    capacity_bytes: Mapping[str, int]
    max_dataset_bytes: int = 1 << 30
    max_running_jobs: int = 1
    max_waiting_jobs: int = 1000
    kept: timedelta = timedelta(days=30)
    command: Command = runner_command


async def run(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code. Jobs that run go on."""
    config = settings.training
    folder = settings.common.data_dir / "training"
    async with (
        open_database(settings) as database,
        opened_store(config.artifacts_url, folder) as store,
        open_channel(_adapters(settings)) as channel,
    ):
        workshop = Workshop(
            database=database,
            store=store,
            registry=AdapterRegistry(channel),
            models=BaseModels(
                _served(settings), config.import_roots, made=settings.common.data_dir / "inference" / "models"
            ),
            folder=folder,
            shared=settings.common.data_dir,
            capacity_bytes=await asyncio.to_thread(device_memory),
            max_dataset_bytes=config.max_dataset_bytes,
            max_running_jobs=config.max_running_jobs,
            max_waiting_jobs=config.max_waiting_jobs,
            kept=timedelta(days=config.keep_job_files_days),
        )
        return await run_service(
            build(workshop),
            settings.listen("training"),
            on_serving=lambda server: announce("training", settings.common.host, server),
        )


def build(workshop: Workshop) -> Service:
    """The service over what ``workshop`` has."""
    database, places = workshop.database, Places(jobs=workshop.folder / "jobs", cache=workshop.folder / "cache")
    journal, fence = Journal(encode_event), Fence(database)
    datasets = Datasets(database, workshop.store, places.cache)
    validation = Validation(workshop.models, datasets, workshop.registry, workshop.capacity_bytes)
    around = Surroundings(
        fence=fence,
        journal=journal,
        intake=SpoolIntake(fence, journal),
        ledger=DeviceLedger(workshop.shared),
        jobs=places.jobs,
        command=workshop.command,
    )
    supervisor = Supervisor(
        database,
        around,
        Publisher(fence, journal, workshop.registry),
        capacity_bytes=workshop.capacity_bytes,
        max_running_jobs=workshop.max_running_jobs,
    )
    validator = JobValidator(database, journal, validation, places.jobs)
    checking = Checking(database, datasets, validator, supervisor.ring)
    job_rooms = JobRooms(
        jobs=Jobs(database, journal, places.jobs, max_waiting=workshop.max_waiting_jobs),
        validation=validation,
        checking=checking,
        supervisor=supervisor,
        ledger=around.ledger,
        capacity_bytes=workshop.capacity_bytes,
    )
    dataset_rooms = DatasetRooms(
        datasets=datasets,
        intake=DatasetIntake(workshop.store, workshop.max_dataset_bytes),
        checking=checking,
        models=workshop.models,
    )
    return Service(
        name="training",
        mounts=[
            Mount(training_grpc.add_TrainingServiceServicer_to_server, TrainingServicer(job_rooms)),
            Mount(dataset_grpc.add_DatasetServiceServicer_to_server, DatasetServicer(dataset_rooms)),
        ],
        background={
            "supervisor": supervisor.run,
            "checking": checking.run,
            "housekeeping": Housekeeping(database, workshop.store, places, kept=workshop.kept).run,
        },
    )


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """The database, brought to this build's schema."""
    database = Database(database_config(settings.training.database_url, settings, "training"))
    try:
        await migrate(database, SCHEMA)
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def opened_store(url: str | None, folder: Path) -> AsyncIterator[ArtifactStore]:
    """The store at ``url``, or in the service's own folder."""
    store = open_store(url or str(folder / "artifacts"), staging=folder / "staging")
    try:
        yield store
    finally:
        store.close()


def _served(settings: Settings) -> dict[str, str]:
    """The operator's own models by name."""
    return wanted_models(settings.inference) if settings.inference.models else {}


def _adapters(settings: Settings) -> Peer:
    return Peer(
        address=settings.training.adapters_address or settings.address_of("adapters"),
        tls_ca=settings.training.adapters_tls_ca or settings.common.tls_cert,
        token_file=settings.training.adapters_token_file or settings.common.token_file,
    )
