"""Stored datasets: made, read, listed and deleted by their owner, and checked once after they arrived.

Another owner's dataset does not exist. Event loop; rows are read in threads.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from slipstream_server.errors import (
    DatasetNotFound,
    DependencyUnavailable,
    InternalError,
    ResourceExists,
    SlipstreamError,
    StaleEtag,
    StorageFull,
    WrongState,
)
from slipstream_server.resource_names import new_id
from slipstream_server.storage.artifact_drafts import Artifact
from slipstream_server.storage.artifacts import ArtifactStore
from slipstream_server.storage.columns import utc_now
from slipstream_server.storage.database import Database
from slipstream_server.storage.pages import Page, PageRequest, read_page
from slipstream_server.storage.request_records import RequestKey
from slipstream_server.training.dataset_intake import dataset_digest
from slipstream_server.training.dataset_rows import check_dataset
from slipstream_server.training.resources import Dataset, DatasetReport, FileOfDataset, as_json, dataset_of
from slipstream_server.training.states import ENDED, DatasetState
from slipstream_server.training.tables import REQUESTS, DatasetRow, JobRow

logger = logging.getLogger(__name__)

# Failures that another try may not meet.
_PASSING = (StorageFull, DependencyUnavailable)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetDetails:
    """What the bringer of a dataset says about it. ``wanted_format`` empty: to be recognised."""

    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    wanted_format: str = ""
    source: str = ""


class Datasets:
    """The datasets of one database, whose files are in ``store``; ``cache`` is a local folder for reading them."""

    def __init__(self, database: Database, store: ArtifactStore, cache: Path) -> None:
        self._database = database
        self._store = store
        self._cache = cache

    async def repeated(self, key: RequestKey) -> Dataset | None:
        """The dataset that was made for ``key``, None for a new request. Raises RequestIdReused, DatasetNotFound."""
        async with self._database.read() as session:
            known = await REQUESTS.get(session, key)
            if known is None or known.response is None:
                return None
            return dataset_of(await find_dataset(session, key.owner, known.response.decode()))

    async def check_new(self, dataset_id: str) -> None:
        """Raises ResourceExists where there is such a dataset."""
        async with self._database.read() as session:
            await _check_free(session, dataset_id)

    async def add(
        self,
        owner: str,
        dataset_id: str,
        artifact: Artifact,
        files: Sequence[FileOfDataset],
        details: DatasetDetails,
        *,
        key: RequestKey | None = None,
    ) -> Dataset:
        """Keep the files in ``artifact`` as a dataset in VALIDATING. Raises ResourceExists, RequestIdReused."""
        async with self._database.write() as session:
            if key is not None and (known := await REQUESTS.get_or_claim(session, key)) is not None and known.response:
                return dataset_of(await find_dataset(session, owner, known.response.decode()))
            await _check_free(session, dataset_id)
            row = _new_row(owner, dataset_id or new_id("dataset"), artifact, files, details)
            session.add(row)
            await session.flush()
            if key is not None:
                await REQUESTS.answer(session, key, row.id.encode())
            return dataset_of(row)

    async def get(self, owner: str, dataset_id: str) -> Dataset:
        async with self._database.read() as session:
            return dataset_of(await find_dataset(session, owner, dataset_id))

    async def list(
        self, owner: str, states: Collection[DatasetState], page_size: int, page_token: str
    ) -> Page[Dataset]:
        """The owner's datasets in one of ``states`` (none given: in any), newest first."""
        page = PageRequest(query=("datasets", owner, *sorted(states)), page_size=page_size, page_token=page_token)
        rows = select(DatasetRow).where(DatasetRow.owner == owner)
        if states:
            rows = rows.where(DatasetRow.state.in_(states))
        async with self._database.read() as session:
            found = await read_page(session, rows, (DatasetRow.create_time, DatasetRow.id), page, descending=True)
            return Page(tuple(dataset_of(row) for row in found.items), found.next_page_token)

    async def delete(self, owner: str, dataset_id: str, etag: str) -> None:
        """Raises WrongState while a job that has not ended uses it, StaleEtag."""
        async with self._database.write() as session:
            row = await find_dataset(session, owner, dataset_id)
            if etag not in ("", str(row.generation)):
                raise StaleEtag(f"etag: {etag[:40]!a} is not that of the stored dataset; read it again")
            running = select(JobRow.id).where(JobRow.dataset == row.id, JobRow.state.not_in(ENDED)).limit(1)
            if (job := await session.scalar(running)) is not None:
                raise WrongState(
                    f"trainingJobs/{job} has not ended and uses the dataset", metadata={"state": row.state.upper()}
                )
            await session.delete(row)

    async def folder(self, dataset: Dataset) -> Path:
        """A local folder with the dataset's files, to be read only."""
        return await self._store.materialize(dataset.artifact, self._cache)

    async def report(self, artifact: Artifact, files: Sequence[FileOfDataset], wanted_format: str) -> DatasetReport:
        """What reading the rows of a dataset finds that is not to be kept."""
        folder = await self._store.materialize(artifact.digest, self._cache)
        return await asyncio.to_thread(check_dataset, folder, files, wanted_format)

    async def unchecked(self) -> tuple[str, ...]:
        """The ids of the datasets whose rows are still to be read, oldest first."""
        waiting = select(DatasetRow.id).where(DatasetRow.state == DatasetState.VALIDATING)
        async with self._database.read() as session:
            return tuple(await session.scalars(waiting.order_by(DatasetRow.create_time)))

    async def check(self, dataset_id: str) -> None:
        """Read the rows of an unchecked dataset and store what was found. Raises StorageFull, DependencyUnavailable."""
        async with self._database.read() as session:
            row = await session.get(DatasetRow, dataset_id)
            if row is None or row.state != DatasetState.VALIDATING:
                return
            dataset = dataset_of(row)
        try:
            folder = await self.folder(dataset)
            report = await asyncio.to_thread(check_dataset, folder, dataset.files, dataset.wanted_format)
            await self._conclude(dataset_id, report)
        except _PASSING:
            raise
        except SlipstreamError as error:
            await self._fail(dataset_id, error)
        except Exception:
            logger.exception("the rows of dataset %s could not be read", dataset_id)
            await self._fail(dataset_id, InternalError("the rows could not be read; the service's log tells why"))

    async def _conclude(self, dataset_id: str, report: DatasetReport) -> None:
        async with self._database.write() as session:
            row = await session.get(DatasetRow, dataset_id)
            if row is not None and row.state == DatasetState.VALIDATING:
                row.state = DatasetState.READY if report.is_valid else DatasetState.INVALID
                row.report_json = as_json(report)
                _touch(row)

    async def _fail(self, dataset_id: str, error: SlipstreamError) -> None:
        async with self._database.write() as session:
            row = await session.get(DatasetRow, dataset_id)
            if row is not None and row.state == DatasetState.VALIDATING:
                row.state, row.error_reason, row.error_message = DatasetState.FAILED, error.reason, error.message
                _touch(row)


async def find_dataset(session: AsyncSession, owner: str, dataset_id: str) -> DatasetRow:
    """Raises DatasetNotFound, also for another owner's."""
    row = await session.get(DatasetRow, dataset_id)
    if row is None or row.owner != owner:
        raise DatasetNotFound(f"there is no dataset datasets/{dataset_id}")
    return row


async def _check_free(session: AsyncSession, dataset_id: str) -> None:
    if dataset_id and await session.get(DatasetRow, dataset_id) is not None:
        raise ResourceExists(f"there is a dataset datasets/{dataset_id} already")


def _new_row(
    owner: str, dataset_id: str, artifact: Artifact, files: Sequence[FileOfDataset], details: DatasetDetails
) -> DatasetRow:
    return DatasetRow(
        id=dataset_id,
        owner=owner,
        display_name=details.display_name,
        labels_json=json.dumps(dict(details.labels), sort_keys=True),
        state=DatasetState.VALIDATING,
        artifact=artifact.digest,
        files_json=as_json(tuple(files)),
        wanted_format=details.wanted_format,
        size_bytes=artifact.manifest.total_bytes,
        digest=dataset_digest(files, details.wanted_format),
        source=details.source,
    )


def _touch(row: DatasetRow) -> None:
    row.generation += 1
    row.update_time = utc_now()
