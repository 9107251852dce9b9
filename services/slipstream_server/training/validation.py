"""What must be known of a job before it may wait in the queue: its model, its rows, its memory.

``quickly`` is what the call that makes the job can wait for; ``fully`` reads every row with the model's own tokenizer
and writes what the runner needs. Event loop; the work is done in threads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slipstream_server.errors import (
    DependencyUnavailable,
    IncompatibleAdapter,
    InternalError,
    InvalidDataset,
    InvalidField,
    SlipstreamError,
    StorageFull,
    UnsupportedField,
    WrongState,
)
from slipstream_server.storage.blocking import named
from slipstream_server.storage.database import Database
from slipstream_server.training.base_models import BaseModel, BaseModels, require_causal
from slipstream_server.training.datasets import Datasets
from slipstream_server.training.job_data import EVALUATION_FILE, TRAIN_FILE, JobData, splits_for, write_job_data
from slipstream_server.training.job_folder import JobFolder, write_atomically
from slipstream_server.training.journal import Journal
from slipstream_server.training.memory import TrainingMemory, estimate_training
from slipstream_server.training.publishing import Registry
from slipstream_server.training.recipe import TrainingRecipe, encode_recipe
from slipstream_server.training.resources import Dataset, Problem, as_json, job_of
from slipstream_server.training.specification import DEFAULT_MAX_LENGTH, JobPlan, JobSpec, check_spec
from slipstream_server.training.states import DatasetState, JobState
from slipstream_server.training.supervisor import check_can_ever_fit
from slipstream_server.training.tables import JobRow

logger = logging.getLogger(__name__)

QUICK_S = 5.0
_PASSING = (StorageFull, DependencyUnavailable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A specification with all defaults, and what it needs. ``data`` is None where the rows were not read,
    ``base_name`` empty where the registry was not asked by which of its names it knows the base.
    """

    spec: JobSpec
    base: BaseModel
    memory: TrainingMemory
    device: str
    data: JobData | None = None
    base_name: str = ""


class Validation:
    """Checks jobs; ``capacity_bytes`` is the memory of each device of this machine."""

    def __init__(
        self, models: BaseModels, datasets: Datasets, registry: Registry, capacity_bytes: Mapping[str, int]
    ) -> None:
        self._models = models
        self._datasets = datasets
        self._registry = registry
        self._capacity_bytes = capacity_bytes

    async def quickly(self, owner: str, spec: JobSpec) -> JobSpec:
        """``spec`` with what could be found out in a few seconds filled in.

        Raises what is known to be wrong by then; a model that has to be fetched is left for ``fully``.
        """
        check_spec(spec)
        self.device(spec)
        dataset = await self._datasets.get(owner, spec.dataset)
        check_dataset_usable(dataset, spec)
        try:
            async with asyncio.timeout(QUICK_S):
                checked = await self.with_model(spec)
                await self._base_name(spec, checked.base)
                return checked.spec
        except (TimeoutError, DependencyUnavailable):
            return spec

    async def _base_name(self, spec: JobSpec, base: BaseModel) -> str:
        """The name of ``base`` under which the result is registered: that of the adapter's other versions.

        Raises IncompatibleAdapter for a result that the registry would refuse in the end.
        """
        if spec.publication is None:
            return base.name
        adapter = spec.publication.adapter
        try:
            taken_for = await self._registry.base_of(adapter)
        except SlipstreamError as error:
            # It is asked again when there is something to publish.
            logger.warning("the base of adapter %s is not known: %s", adapter, error.message)
            return base.name
        if taken_for and taken_for not in (base.name, base.served_as):
            raise IncompatibleAdapter(
                f"spec.publish.adapter: {adapter!r} is for the base {taken_for!a}; the job would train {base.name!a}"
            )
        return taken_for or base.name

    async def with_model(self, spec: JobSpec, *, must_fit: bool = True) -> Checked:
        """The specification checked against its model. Raises what resolving does, InvalidField, OutOfMemory."""
        base = await asyncio.to_thread(self._models.resolve, spec.base_model, spec.base_model_revision)
        require_causal(base)
        spec = filled_in(spec, base)
        device = self.device(spec)
        checked = await _with_memory(spec, base, device, None, spec.hyperparameters.max_length)
        if must_fit:
            # Rows may be much shorter than they are allowed to be: what is needed however short they are.
            self._check_fits(await _with_memory(spec, base, device, None, 1))
        return checked

    async def fully(self, owner: str, spec: JobSpec, folder: JobFolder | None, *, must_fit: bool = True) -> Checked:
        """Everything checked; what the runner needs is written into ``folder`` where there is one.

        Raises InvalidDataset naming the first row that is wrong, and what ``with_model`` does.
        """
        check_spec(spec)
        dataset = await self._datasets.get(owner, spec.dataset)
        check_dataset_usable(dataset, spec)
        checked = await self.with_model(spec, must_fit=must_fit)
        files = await self._datasets.folder(dataset)
        data = await asyncio.to_thread(_write, checked, dataset, files, folder)
        checked = await _with_memory(checked.spec, checked.base, checked.device, data, data.longest_tokens)
        if must_fit:
            self._check_fits(checked)
        return dataclasses.replace(checked, base_name=await self._base_name(spec, checked.base))

    def _check_fits(self, checked: Checked) -> None:
        spec = checked.spec
        needed = spec.memory_bytes or checked.memory.total
        check_can_ever_fit(checked.device, spec.num_processes, needed, self._capacity_bytes)

    def device(self, spec: JobSpec) -> str:
        """The kind of device that ``spec`` means. Raises UnsupportedField where this machine has none."""
        has_gpu = any(name != "cpu" for name in self._capacity_bytes)
        if spec.device_type == "cuda" and not has_gpu:
            raise UnsupportedField.of("spec.resources.device_type", "this machine has no cuda device")
        return spec.device_type or ("cuda" if has_gpu else "cpu")


class JobValidator:
    """Takes stored jobs from VALIDATING to QUEUED, or to FAILED."""

    def __init__(self, database: Database, journal: Journal, validation: Validation, jobs: Path) -> None:
        self._database = database
        self._journal = journal
        self._validation = validation
        self._jobs = jobs

    async def run(self, job: str) -> None:
        """Raises StorageFull and DependencyUnavailable: the job stays, and is checked again."""
        async with self._database.read() as session:
            row = await session.get(JobRow, job)
            if row is None or row.state != JobState.VALIDATING:
                return
            stored = job_of(row)
        folder = JobFolder(self._jobs / job)
        try:
            checked = await self._validation.fully(stored.owner, stored.spec, folder)
        except _PASSING as error:
            await self._explain(job, f"waiting: {error.message}")
            raise
        except SlipstreamError as error:
            await self._end(job, Problem(reason=error.reason, message=error.message, metadata=error.metadata), folder)
        except Exception:
            logger.exception("job %s could not be checked", job)
            message = "the job could not be checked; the service's log tells why"
            await self._end(job, Problem(reason=InternalError.reason, message=message), folder)
        else:
            await self._queue(job, checked, folder)

    async def _queue(self, job: str, checked: Checked, folder: JobFolder) -> None:
        plan = plan_for(checked, folder)
        async with self._database.write() as session:
            row = await session.get(JobRow, job)
            if row is not None and row.state == JobState.VALIDATING:
                row.spec_json, row.plan_json = as_json(checked.spec), as_json(plan)
                await self._journal.move(session, row, JobState.QUEUED)

    async def _explain(self, job: str, message: str) -> None:
        async with self._database.write() as session:
            row = await session.get(JobRow, job)
            if row is not None and row.state == JobState.VALIDATING:
                self._journal.explain(row, message)

    async def _end(self, job: str, problem: Problem, folder: JobFolder) -> None:
        async with self._database.write() as session:
            row = await session.get(JobRow, job)
            if row is not None and row.state == JobState.VALIDATING:
                await self._journal.move(session, row, JobState.FAILED, problem=problem)
        await asyncio.to_thread(shutil.rmtree, folder.path, ignore_errors=True)


def check_dataset_usable(dataset: Dataset, spec: JobSpec) -> None:
    """Raises WrongState before the rows were read, InvalidDataset where they are of no use, InvalidField for splits."""
    if dataset.state is DatasetState.VALIDATING:
        text = f"datasets/{dataset.id} is still being read; its rows are not known yet"
        raise WrongState(text, metadata={"state": "VALIDATING"}, retry_after_s=1.0)
    report = dataset.report
    if dataset.state is DatasetState.FAILED or report is None:
        raise InvalidDataset(f"datasets/{dataset.id} could not be read")
    if dataset.state is DatasetState.INVALID and not spec.skip_invalid_rows:
        raise _invalid(dataset)
    splits_for(spec, dataset.files)


def filled_in(spec: JobSpec, base: BaseModel) -> JobSpec:
    """``spec`` with the defaults that depend on the model. Raises InvalidField for rows longer than its context."""
    context = base.facts.context_tokens
    max_length = spec.hyperparameters.max_length
    if spec.max_length_is_default:
        max_length = min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    elif context is not None and max_length > context:
        message = f"{max_length} exceeds the model's context of {context} tokens"
        raise InvalidField.of("spec.hyperparameters.max_length_tokens", message)
    hyperparameters = msgspec.structs.replace(spec.hyperparameters, max_length=max_length)
    revision = base.revision if base.has_commits else spec.base_model_revision
    return msgspec.structs.replace(
        spec, hyperparameters=hyperparameters, max_length_is_default=False, base_model_revision=revision
    )


def plan_for(checked: Checked, folder: JobFolder) -> JobPlan:
    """The plan of a job whose rows were written."""
    data = checked.data
    assert data is not None
    return JobPlan(
        base_model_name=checked.base_name or checked.base.name,
        base_model_revision=checked.base.revision,
        base_model_digest=checked.base.digest,
        dataset_digest=data.digest,
        device=checked.device,
        memory_bytes=checked.spec.memory_bytes or checked.memory.total,
        num_train_rows=data.num_train_rows,
        num_evaluation_rows=data.num_evaluation_rows,
        num_skipped_rows=data.num_skipped_rows,
        recipe_digest=_recipe(checked, data, folder).digest(),
    )


async def _with_memory(
    spec: JobSpec, base: BaseModel, device: str, data: JobData | None, longest_tokens: int
) -> Checked:
    memory = await asyncio.to_thread(estimate_training, base.folder, base.facts, spec, device, longest_tokens)
    return Checked(spec=spec, base=base, memory=memory, device=device, data=data)


def _write(checked: Checked, dataset: Dataset, files: Path, folder: JobFolder | None) -> JobData:
    tokenizer = checked.base.tokenizer()
    if folder is None:
        return write_job_data(None, files, dataset.files, checked.spec, tokenizer)
    try:
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = write_job_data(folder.path, files, dataset.files, checked.spec, tokenizer)
        write_atomically(folder.recipe, encode_recipe(_recipe(checked, data, folder)))
    except OSError as error:
        raise named(error) from error
    return data


def _recipe(checked: Checked, data: JobData, folder: JobFolder) -> TrainingRecipe:
    return checked.spec.recipe(
        base_model_folder=str(checked.base.folder),
        base_model_name=checked.base.name,
        base_model_digest=checked.base.digest,
        train_file=str(folder.path / TRAIN_FILE),
        eval_file=str(folder.path / EVALUATION_FILE) if data.has_evaluation_file else None,
        dataset_digest=data.digest,
        device=checked.device,
    )


def _invalid(dataset: Dataset) -> InvalidDataset:
    assert dataset.report is not None
    count = sum(dataset.report.error_counts.values())
    first = dataset.report.errors[0]
    # A file without rows is wrong as a whole.
    place = ", ".join(
        [first.path, *([f"line {first.line}"] if first.line else []), *([first.field] if first.field else [])]
    )
    metadata = {"line": str(first.line), "field": first.field, "path": first.path, "row_error": first.reason}
    return InvalidDataset(
        f"datasets/{dataset.id} has {count} row errors, the first in {place}: {first.message}", metadata=metadata
    )
