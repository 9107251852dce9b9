"""Models as a managed resource: loaded, unloaded and deleted as clients ask, and brought back after a restart.

    load()   -> checked, recorded -> fetch -> plan -> room (others give way) -> front.add_model -> READY or FAILED
    unload() -> recorded -> the running requests' grace -> the worker ends -> room is free

What is asked for is recorded before the call returns; the rest is the work of one task a model, which the next one for
the same model waits for. Decisions are taken one at a time. Event loop; ``run`` goes on as long as the service does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slipstream_server.errors import (
    InternalError,
    InvalidField,
    ResourceExists,
    SlipstreamError,
    WrongState,
)
from slipstream_server.inference.fetching import ModelFetcher
from slipstream_server.inference.front import InferenceFront, ModelPlan
from slipstream_server.inference.load_choice import LoadChoice
from slipstream_server.inference.model_places import client_place, operator_place
from slipstream_server.inference.model_records import ModelRecords, NewModel, StoredModel
from slipstream_server.inference.model_states import ModelStates, ModelView
from slipstream_server.inference.plans import ServingDefaults, plan_of
from slipstream_server.inference.room import DeviceRoom
from slipstream_server.inference.supervisor import ModelState
from slipstream_server.models.progress import PullProgress
from slipstream_server.models.tool_process import run_tool
from slipstream_server.storage.request_records import RequestKey

logger = logging.getLogger(__name__)

_PURGE_EVERY_S = 3600.0
_FIT_TIMEOUT_S = 120.0
_IN_MEMORY = frozenset({ModelState.LOADING, ModelState.READY, ModelState.RESTARTING})
_AT_REST = frozenset({ModelState.UNLOADED, ModelState.FAILED})
# What is said to those who delete a model that is under way to a state in which it can be deleted.
_BEFORE_DELETION = {
    ModelState.UNLOADING: "model {name} is being unloaded; delete it once it is UNLOADED",
    ModelState.CREATING: "model {name} is being made; delete it once that has ended",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWish:
    """What a client asks of LoadModel; None is "as it was"."""

    name: str
    source: str = ""
    revision: str = ""
    options: LoadChoice | None = None
    pinned: bool | None = None
    owner: str = "anonymous"


class ModelLoads:
    """The models of one service; see the module's docstring."""

    def __init__(
        self,
        front: InferenceFront,
        model_records: ModelRecords,
        fetcher: ModelFetcher,
        room: DeviceRoom,
        defaults: ServingDefaults,
    ) -> None:
        self._front = front
        self.model_records = model_records
        self._fetcher = fetcher
        self.room = room
        self._defaults = defaults
        self._deciding = asyncio.Lock()
        self._work: dict[str, asyncio.Task[None]] = {}
        self.states = ModelStates(front, model_records, fetcher, room)

    # Life.

    async def begin(self, at_start: Mapping[str, str]) -> None:
        """Read what is known, note what the operator's flags name (name -> source), and announce what is to come."""
        await self.model_records.read()
        await self._note_flags(at_start)
        self.states.begin()

    async def run(self) -> None:
        """Bring back what is wanted, and keep record of what becomes of every load. Never returns."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.states.follow(), name="model-states")
                tasks.create_task(self._restore(), name="model-restore")
                tasks.create_task(self._forget_requests(), name="model-requests")
        finally:
            for task in self._work.values():
                task.cancel()
            await asyncio.gather(*self._work.values(), return_exceptions=True)
            self._fetcher.close()

    async def _note_flags(self, at_start: Mapping[str, str]) -> None:
        for name, spec in at_start.items():
            place = operator_place(spec)
            record = self.model_records.by_name.get(name)
            wanted: dict[str, Any] = {"at_start": True, "wanted": True, "pinned": True}
            if record is None:
                new = NewModel(id=name, source=place.source, locator=place.locator, by_operator=True, **wanted)
                await self.model_records.add(new)
            elif record.locator != place.locator:
                wanted |= {"source": place.source, "locator": place.locator, "by_operator": True, "folder": ""}
                await self.model_records.change(name, **wanted)
            elif any(getattr(record, key) != value for key, value in wanted.items()):
                await self.model_records.change(name, **wanted)
        for name, record in list(self.model_records.by_name.items()):
            if record.at_start and name not in at_start:
                await self.model_records.change(name, at_start=False, wanted=False, pinned=False)

    async def _forget_requests(self) -> None:
        while True:
            try:
                await self.model_records.purge()
            except SlipstreamError as error:
                logger.warning("old requests could not be forgotten: %s", error.message)
            await asyncio.sleep(_PURGE_EVERY_S)

    async def _restore(self) -> None:
        """One after the other: the operator's, the pinned, then what was loaded last."""
        for record in sorted(self.model_records.by_name.values(), key=_restored_first):
            current = self.model_records.by_name.get(record.id)
            if current is not None and current.wanted and record.id not in self._work:
                await asyncio.wait({self._start(record.id, may_evict=False)})

    # Loading.

    async def load(self, wish: LoadWish, *, key: RequestKey | None = None, validate_only: bool = False) -> ModelView:
        """Record that a model is wanted, and begin to bring it. Raises what LoadModel's contract says."""
        if wish.options is not None:
            wish.options.check()
        async with self._deciding:
            if key is not None and (known := await self.model_records.answered(key)) is not None:
                return self.states.view(known)
            model = await self._wished(wish)
            record = self.model_records.by_name.get(wish.name)
            is_coming = record is not None and self._front.status(wish.name).state in _IN_MEMORY
            needed = {} if is_coming else await self._check(model)
            if not validate_only:
                await self._record(model, record, key)
                if not is_coming:
                    self._start(wish.name)
                return self.states.view(wish.name)
        # This takes seconds, and decides nothing for others.
        if not is_coming:
            await self._check_weights(model)
        return self.states.would_be(model, sum(needed.values()))

    async def _wished(self, wish: LoadWish) -> NewModel:
        """The model as it would be recorded. Raises ResourceExists or WrongState where that contradicts what is."""
        record = self.model_records.by_name.get(wish.name)
        if record is None:
            place = await asyncio.to_thread(client_place, wish.source or wish.name, wish.revision, self._fetcher.roots)
            return NewModel(
                id=wish.name, source=place.source, locator=place.locator, revision=wish.revision, owner=wish.owner,
                options=wish.options, pinned=bool(wish.pinned), wanted=True,
            )  # fmt: skip
        if wish.source and wish.source not in (record.source, record.locator):
            raise ResourceExists(f"source: a model {wish.name!r} exists, from {record.source[:100]!r}")
        if wish.revision and wish.revision != record.revision:
            raise ResourceExists(f"revision: a model {wish.name!r} exists, of revision {record.revision[:100]!r}")
        self._refuse_other_options(record, wish.options)
        pinned = record.pinned if wish.pinned is None else wish.pinned
        return replace(record, options=wish.options or record.options, pinned=pinned, wanted=True)

    def _refuse_other_options(self, record: StoredModel, options: LoadChoice | None) -> None:
        state = self._front.status(record.id).state
        if state is ModelState.CREATING:
            raise WrongState(f"model {record.id} is being made", metadata={"state": state.upper()})
        if state in _IN_MEMORY and options is not None and options != (record.options or LoadChoice()):
            raise WrongState(
                f"model {record.id} is {state} with other options; unload it first", metadata={"state": state.upper()}
            )

    async def _check(self, model: NewModel) -> dict[str, int]:
        """What it would take, by device, where its files are here already; nothing where they are not."""
        options = model.options or LoadChoice()
        _check_device(options.device, self.room.capacity)
        plan = await self._plan_at_hand(model)
        return {} if plan is None or model.at_start else self.room.check(plan, options.memory_fraction)

    async def _check_weights(self, model: NewModel) -> None:
        """Raises ModelLoadFailed where weights that are here already do not fit their configuration."""
        plan = await self._plan_at_hand(model)
        if plan is not None and plan.worker.engine != "null":
            asked = {"folder": str(plan.worker.model_folder), "task": plan.worker.load.task}
            await run_tool("fit", asked, timeout_s=_FIT_TIMEOUT_S)

    async def _plan_at_hand(self, model: NewModel) -> ModelPlan | None:
        found = await self._fetcher.at_hand(model)
        if found is None:
            return None
        prepared, files = found
        return plan_of(model.id, model.source, prepared, files.facts, model.options or LoadChoice(), self._defaults)

    async def _record(self, model: NewModel, record: StoredModel | None, key: RequestKey | None) -> None:
        if record is None:
            await self.model_records.add(model, key=key)
            return
        changes = {name: getattr(model, name) for name in ("options", "pinned", "wanted")}
        is_new = any(getattr(record, name) != value for name, value in changes.items())
        await self.model_records.change(record.id, key=key, counts=is_new, **changes)

    def _start(self, name: str, *, may_evict: bool = True) -> asyncio.Task[None]:
        if not self._front.is_served(name):
            self._front.announce(name)
        return self._begin(name, self._bring(name, self._work.get(name), may_evict=may_evict))

    async def _bring(self, name: str, before: asyncio.Task[None] | None, *, may_evict: bool) -> None:
        if before is not None:
            await asyncio.wait({before})
        record = self.model_records.by_name.get(name)
        if record is None or not record.wanted:  # somebody has changed their mind meanwhile
            return
        try:
            if self._front.is_served(name):
                await self._front.remove_model(name)
            self._front.announce(name)
            plan = await self._fetched(record)
            fraction = (record.options or LoadChoice()).memory_fraction
            await self.room.take(plan, fraction, self._evict_for(name), may_evict=may_evict, must_come=record.at_start)
            self._front.add_model(plan)
        except SlipstreamError as error:
            logger.error("model %s cannot be served: %s", name, error.message)
            await self._failed(name, error)
        except asyncio.CancelledError:
            self.room.budget.release(name)
            raise
        except Exception:
            logger.exception("model %s cannot be served", name)
            await self._failed(name, InternalError(f"model {name} could not be prepared; the log tells why"))

    async def _fetched(self, record: StoredModel) -> ModelPlan:
        def report(progress: PullProgress) -> None:
            self._front.report(record.id, str(progress.stage), progress.fraction or 0.0)

        prepared, files = await self._fetcher.fetch(record, report)
        self.states.files[record.id] = files
        options = record.options or LoadChoice()
        plan = plan_of(record.id, record.source, prepared, files.facts, options, self._defaults)
        where: dict[str, Any] = {"resolved_source": prepared.source, "resolved_revision": prepared.revision}
        await self.states.note(record.id, folder=str(prepared.folder), error_reason="", error_message="", **where)
        return plan

    async def _failed(self, name: str, error: SlipstreamError) -> None:
        self._front.give_up(name, error)
        await self.room.release(name)
        await self.states.note(name, error)

    def _evict_for(self, newcomer: str) -> Any:
        async def evict(victims: tuple[str, ...]) -> None:
            logger.info("models %s make room for %s", ", ".join(victims), newcomer)
            tasks = {name: self._take_out(name, 0.0, f"unloaded to make room for {newcomer}") for name in victims}
            async with self._deciding:
                for name, task in tasks.items():
                    if self._work.get(name) is task:  # nobody has asked for it again meanwhile
                        await self.states.note(name, wanted=False)
            await asyncio.wait(tasks.values())

        return evict

    # Unloading.

    async def unload(self, name: str, *, grace_s: float, force: bool = False, etag: str = "") -> ModelView:
        """Take a model out of memory. Raises ModelNotFound, WrongState, StaleEtag."""
        async with self._deciding:
            record, state = self.model_records.get(name), self._front.status(name).state
            if state is ModelState.CREATING:
                raise WrongState(f"model {name} is being made", metadata={"state": state.upper()})
            if record.pinned and not force and state is not ModelState.UNLOADED:
                raise WrongState(f"model {name} is pinned; set force to unload it all the same")
            pinned = record.pinned and not force
            is_new = (record.wanted, record.pinned) != (False, pinned)
            cleared: dict[str, Any] = {"error_reason": "", "error_message": ""}
            await self.model_records.change(name, etag=etag, counts=is_new, wanted=False, pinned=pinned, **cleared)
            if state is not ModelState.UNLOADING:
                self._take_out(name, grace_s)
        return self.states.view(name)

    def _take_out(self, name: str, grace_s: float, note: str = "") -> asyncio.Task[None]:
        """End what is done to bring a model, and its worker; the task returns when both are gone."""
        before = self._work.get(name)
        if before is not None:
            before.cancel()
        if self._front.is_served(name):
            self._front.begin_unloading(name)
        else:
            self._front.rest(name, note=note)
        return self._begin(name, self._end(name, before, grace_s, note))

    async def _end(self, name: str, before: asyncio.Task[None] | None, grace_s: float, note: str) -> None:
        if before is not None:
            await asyncio.wait({before})
        try:
            if self._front.is_served(name):
                await self._front.remove_model(name, grace_s=grace_s)
        finally:
            self._front.rest(name, note=note)  # with no wait since it was removed: it is never unknown
            await self.room.release(name)

    async def delete(self, name: str, *, etag: str = "") -> None:
        """Forget an unloaded model, and its files where the service made them. ModelNotFound, WrongState, StaleEtag."""
        async with self._deciding:
            record, state = self.model_records.get(name), self._front.status(name).state
            if state not in _AT_REST:
                first = _BEFORE_DELETION.get(state, f"model {name} is {state}; unload it first")
                raise WrongState(first.format(name=name), metadata={"state": state.upper()})
            await self.model_records.remove(name, etag=etag)
            if self._front.is_served(name):
                await self._front.remove_model(name)
                await self.room.release(name)
            self._front.forget(name)
            self.states.files.pop(name, None)
        if record.owns_folder and (folder := record.known_folder) is not None:
            await asyncio.to_thread(_remove_below, self._fetcher.own_root, folder)

    # Bookkeeping.

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"model-work-{name}")
        self._work[name] = task
        task.add_done_callback(lambda done: self._work.pop(name) if self._work.get(name) is done else None)
        return task


def _restored_first(record: StoredModel) -> tuple[bool, bool, float]:
    return not record.at_start, not record.pinned, -(record.load_time.timestamp() if record.load_time else 0.0)


def _check_device(device: str, capacity: Mapping[str, int]) -> None:
    if device.startswith("cuda") and (device if ":" in device else "cuda:0") not in capacity:
        raise InvalidField.of("options.device", f"{device!r}: this machine has {', '.join(capacity)}")


def _remove_below(root: Path, folder: Path) -> None:
    """Remove a folder that the service made; never anything else."""
    if folder.is_symlink() or folder.resolve().parent != root.resolve():
        logger.error("a model's folder lies outside the service's own; it stays")
        return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
