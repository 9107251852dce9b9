"""What is known and shown of each model: its record, what the front does with it, what its files tell.

Follows the front, and keeps in the records what becomes of every load. Decides nothing. Event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from slipstream_server.errors import SlipstreamError
from slipstream_server.inference.fetching import ModelFetcher, ModelFiles
from slipstream_server.inference.front import InferenceFront, ModelPlan
from slipstream_server.inference.model_records import ModelRecords, NewModel, StoredModel
from slipstream_server.inference.room import DeviceRoom
from slipstream_server.inference.supervisor import ModelState, ModelStatus
from slipstream_server.inference.worker_errors import error_of
from slipstream_server.storage.columns import utc_now

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """All there is to tell of a model. ``needed_bytes``: what loading it would take, where that was asked."""

    record: NewModel
    status: ModelStatus
    plan: ModelPlan | None = None
    files: ModelFiles | None = None
    change_time: datetime | None = None
    needed_bytes: int = 0


class ModelStates:
    """The models of one service as others see them. ``files`` has what the prepared folders tell, by model."""

    def __init__(
        self, front: InferenceFront, model_records: ModelRecords, fetcher: ModelFetcher, room: DeviceRoom
    ) -> None:
        self._front = front
        self._model_records = model_records
        self._fetcher = fetcher
        self._room = room
        self.files: dict[str, ModelFiles] = {}
        self._changes: dict[str, datetime] = {}

    def begin(self) -> None:
        """Show every model in the state in which the last process left it, and every change of a record from now on."""
        for record in self._model_records.by_name.values():
            self._show(record)
        self._model_records.on_change = self._recorded

    def _recorded(self, name: str) -> None:
        """A record has changed, perhaps by the hand of whoever makes models."""
        record = self._model_records.by_name.get(name)
        if record is not None:
            is_new = not self._front.knows(name)
            if record.creating or is_new or self._front.status(name).state is ModelState.CREATING:
                self._show(record)
        self._front.notify()

    def _show(self, record: StoredModel) -> None:
        """The state of a model that nothing was done for yet."""
        if record.creating:
            self._front.rest(record.id, ModelState.CREATING)
        elif record.wanted:
            self._front.announce(record.id)
        elif record.error_reason:
            self._front.give_up(record.id, error_of(record.error_reason, record.error_message))
        else:
            self._front.rest(record.id)

    async def follow(self) -> None:
        """Keep record of what becomes of every model, until the front closes."""
        seen: dict[str, ModelState] = {}
        async for statuses in self._front.subscribe():
            for status in statuses:
                if seen.get(status.model) is not status.state:
                    self._changes[status.model] = utc_now()
                    await self._became(status)
            seen = {status.model: status.state for status in statuses}
            self._changes = {name: when for name, when in self._changes.items() if name in seen}

    async def _became(self, status: ModelStatus) -> None:
        name = status.model
        if status.state is ModelState.READY and status.ready is not None:
            self._room.settle(name, status.ready.memory_bytes)
            await self.note(name, load_time=status.ready_time)
        elif status.state is ModelState.FAILED and status.error is not None and self._front.has_given_up(name):
            # At once: a load that comes meanwhile takes its own room.
            self._room.budget.release(name)
            await self._front.remove_failed(name, status.error)
            await self._room.tell_ledger()
            await self.note(name, status.error)
        elif status.state is ModelState.UNLOADED and name not in self.files:
            await self._learn(name)

    async def _learn(self, name: str) -> None:
        """Read what the prepared folder of a model tells, where it has one."""
        record = self._model_records.by_name.get(name)
        if record and (folder := record.known_folder) and (files := await self._fetcher.look_into(folder)):
            self.files[name] = files
            self._front.notify()

    def view(self, name: str) -> ModelView:
        """One model (empty: the default one). Raises ModelNotFound."""
        name = name or self._front.status("").model
        return self._view(self._model_records.get(name), self._front.status(name))

    def views(self) -> Iterator[ModelView]:
        """All models by name."""
        for status in self._front.models():
            if (record := self._model_records.by_name.get(status.model)) is not None:
                yield self._view(record, status)

    def _view(self, record: StoredModel, status: ModelStatus) -> ModelView:
        plan = self._front.plan(record.id) if self._front.is_served(record.id) else None
        files, changed = self.files.get(record.id), self._changes.get(record.id)
        return ModelView(record=record, status=status, plan=plan, files=files, change_time=changed)

    def would_be(self, model: NewModel, needed_bytes: int) -> ModelView:
        """How a model would be shown that is not recorded so yet."""
        is_known = model.id in self._model_records.by_name
        status = self._front.status(model.id) if is_known else ModelStatus(model=model.id, state=ModelState.UNLOADED)
        return ModelView(record=model, status=status, files=self.files.get(model.id), needed_bytes=needed_bytes)

    async def note(self, name: str, error: SlipstreamError | None = None, **changes: Any) -> None:
        """Keep what happened. Serving goes on where the database cannot be written."""
        if error is not None:
            changes |= {"error_reason": error.reason, "error_message": error.message}
        try:
            if name in self._model_records.by_name:
                await self._model_records.change(name, counts=False, **changes)
        except SlipstreamError as failure:
            logger.warning("model %s: what became of it could not be stored: %s", name, failure.message)
