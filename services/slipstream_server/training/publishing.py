"""Registers what a job has made, once: the adapter as a version, then the alias that was asked for.

Each step is stored before the next one begins, and each is asked for with a request id of the attempt's own, so that a
service that dies in between asks again and gets the same answer. Event loop; the registry is reached through the
``Registry`` that the composition root hands in.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from slipstream_server.errors import (
    Aborted,
    CorruptArtifact,
    DependencyUnavailable,
    FailedPrecondition,
    NotFound,
    SlipstreamError,
    StorageFull,
    Unavailable,
)
from slipstream_server.training.fence import Fence
from slipstream_server.training.job_folder import FileDigest, JobFolder, digest_folder
from slipstream_server.training.journal import JobEvent, Journal, ResultPublished
from slipstream_server.training.resources import AliasOutcome, Outcome, Problem, as_json, outcome_of, plan_of, spec_of
from slipstream_server.training.result import TrainingResult, read_result
from slipstream_server.training.specification import JobPlan, JobSpec, Publication
from slipstream_server.training.states import JobState, Order
from slipstream_server.training.tables import JobRow

logger = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_PASSING = (Unavailable, StorageFull)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterUpload:
    """An adapter to be registered, with where it comes from."""

    request_id: str
    adapter: str
    folder: Path
    files: Sequence[FileDigest]
    job: str
    dataset: str
    plan: JobPlan
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    name: str
    digest: str


class Registry(Protocol):
    """The adapter service, as far as jobs need it."""

    async def base_of(self, adapter: str) -> str:
        """The base model that the adapter's versions are for; empty where there is none yet."""

    async def upload(self, upload: AdapterUpload) -> PublishedVersion:
        """Register the adapter, or find what an earlier call with the same request id registered."""

    async def set_alias(self, publication: Publication, version: str, request_id: str) -> AliasOutcome:
        """Point the alias at ``version``; raises FailedPrecondition or Aborted where it does not move."""


class Publisher:
    """Takes jobs from PUBLISHING to their end."""

    def __init__(self, fence: Fence, journal: Journal, registry: Registry) -> None:
        self._fence = fence
        self._journal = journal
        self._registry = registry

    async def run(self, job: str, folder: JobFolder) -> None:
        """Publish the result of ``job``; goes on for as long as the registry does not answer. Raises FencedOut."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                await self._publish(job, folder)
                return
            except _PASSING as error:
                logger.warning("job %s waits for its publication: %s", job, error.message)
                await self._explain(job, f"waiting to publish: {error.message}")
            except SlipstreamError as error:
                await self._end(job, JobState.FAILED, Problem(reason=error.reason, message=error.message))
                return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    async def _publish(self, job: str, folder: JobFolder) -> None:
        async with self._fence.write() as session:
            row = await session.get(JobRow, job)
            if row is None or row.state != JobState.PUBLISHING:
                return
            spec, plan, outcome = spec_of(row), plan_of(row), outcome_of(row)
            if row.wish == Order.CANCEL and outcome is not None and not outcome.version:
                await self._journal.move(session, row, JobState.CANCELLED)
                return
        assert outcome is not None
        assert spec.publication is not None
        request_id = hashlib.sha256(f"{job}/{row.attempt}/{row.create_time.timestamp()}".encode()).hexdigest()[:40]
        if not outcome.version:
            outcome = await self._upload(row, folder, spec, plan, outcome, request_id)
        if spec.publication.alias and outcome.alias is None:
            await self._set_alias(job, spec.publication, outcome, request_id)
        await self._end(job, JobState.SUCCEEDED)

    async def _upload(
        self, row: JobRow, folder: JobFolder, spec: JobSpec, plan: JobPlan, outcome: Outcome, request_id: str
    ) -> Outcome:
        assert spec.publication is not None
        result = await asyncio.to_thread(_checked_result, folder)
        upload = AdapterUpload(
            request_id=request_id,
            adapter=spec.publication.adapter,
            folder=folder.adapter,
            files=result.files,
            job=row.id,
            dataset=spec.dataset,
            plan=plan,
            outcome=outcome,
        )
        version = await self._registry.upload(upload)
        logger.info("job %s is published as %s", row.id, version.name)
        changes = {"version": version.name, "version_digest": version.digest}
        return await self._store(row.id, changes, ResultPublished(version=version.name, digest=version.digest))

    async def _set_alias(self, job: str, publication: Publication, outcome: Outcome, request_id: str) -> None:
        try:
            alias = await self._registry.set_alias(publication, outcome.version, request_id)
        except (FailedPrecondition, Aborted, NotFound) as error:
            problem = Problem(reason=error.reason, message=error.message)
            name = f"adapters/{publication.adapter}/aliases/{publication.alias}"
            alias = AliasOutcome(alias=name, moved=False, problem=problem)
        await self._store(job, {"alias": alias}, alias)

    async def _store(self, job: str, changes: Mapping[str, object], body: ResultPublished | AliasOutcome) -> Outcome:
        """Keep what a step brought, and tell it."""
        while True:
            try:
                async with self._fence.write() as session:
                    row = await session.get_one(JobRow, job)
                    outcome = outcome_of(row)
                    assert outcome is not None
                    outcome = _with(outcome, changes)
                    row.outcome_json = as_json(outcome)
                    await self._journal.tell(session, row, [JobEvent(job=job, attempt=row.attempt, body=body)])
                return outcome
            except (StorageFull, DependencyUnavailable):
                await asyncio.sleep(1.0)

    async def _end(self, job: str, state: JobState, problem: Problem | None = None) -> None:
        async with self._fence.write() as session:
            row = await session.get_one(JobRow, job)
            if row.state == JobState.PUBLISHING:
                await self._journal.move(session, row, state, problem=problem)

    async def _explain(self, job: str, message: str) -> None:
        try:
            async with self._fence.write() as session:
                self._journal.explain(await session.get_one(JobRow, job), message)
        except (StorageFull, DependencyUnavailable):
            pass  # the sentence is for people, and comes again


def _with(outcome: Outcome, changes: Mapping[str, object]) -> Outcome:
    return Outcome(**{name: changes.get(name, getattr(outcome, name)) for name in outcome.__struct_fields__})  # type: ignore[arg-type]


def _checked_result(folder: JobFolder) -> TrainingResult:
    """The result, whose adapter is still what the runner wrote. Raises CorruptArtifact."""
    try:
        result = read_result(folder.result)
        if result is not None and result.files == digest_folder(folder.adapter):
            return result
    except OSError as error:
        logger.warning("a finished job's files cannot be read: %s", error.strerror)
    raise CorruptArtifact("the trained adapter is not what the runner wrote")
