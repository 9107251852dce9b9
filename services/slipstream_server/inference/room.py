"""Room for models on this machine's devices: whether one fits, who gives way, and what the machine's ledger is told.

One load at a time takes room, and what it takes counts from then on, so that two cannot both have the last of it.
Models that hold requests, are on their way, or are pinned never give way. Event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping

from slipstream_server.errors import OutOfMemory, SlipstreamError
from slipstream_server.inference.budget import Candidate, MemoryBudget
from slipstream_server.inference.footprint import footprint
from slipstream_server.inference.front import InferenceFront, ModelPlan
from slipstream_server.inference.model_records import ModelRecords
from slipstream_server.inference.supervisor import ModelState
from slipstream_server.storage.device_ledger import gib

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5.0

Reserve = Callable[[Mapping[str, int]], None]
"""Tells the machine's ledger what all models hold; raises OutOfMemory where others have it. Blocking."""
Measure = Callable[[ModelPlan, Mapping[str, int]], dict[str, int]]
"""What a plan will take, by device, where devices have so much."""
Evict = Callable[[tuple[str, ...]], Awaitable[None]]
"""Takes these models out of memory; returns when it is free."""


class DeviceRoom:
    """The memory that the models of one service share."""

    def __init__(
        self,
        front: InferenceFront,
        model_records: ModelRecords,
        *,
        capacity: Mapping[str, int],
        budget: MemoryBudget,
        reserve: Reserve = lambda total: None,
        measure: Measure = footprint,
    ) -> None:
        self._front = front
        self._model_records = model_records
        self.capacity = capacity
        self.budget = budget
        self._reserve = reserve
        self._measure = measure
        self._taking = asyncio.Lock()

    def check(self, plan: ModelPlan, memory_fraction: float | None) -> dict[str, int]:
        """What ``plan`` would take, by device. Raises OutOfMemory where that is more than there could be."""
        wanted = self._wanted(plan, memory_fraction)
        self._victims(plan.name, wanted, may_evict=True)
        return wanted

    async def take(
        self, plan: ModelPlan, memory_fraction: float | None, evict: Evict, *, may_evict: bool, must_come: bool
    ) -> None:
        """Take room for ``plan``. Raises OutOfMemory unless it ``must_come``: then the log says that it is too much."""
        async with self._taking:
            wanted = self._wanted(plan, memory_fraction)
            try:
                if victims := self._victims(plan.name, wanted, may_evict=may_evict):
                    await evict(victims)
                self.budget.take(plan.name, wanted)
                await self._tell_ledger()
            except OutOfMemory as error:
                if not must_come:
                    self.budget.release(plan.name)
                    raise
                logger.warning("%s; it is loaded all the same, as it was given at the start", error.message)
                self.budget.force(plan.name, wanted)

    def settle(self, name: str, memory_bytes: int) -> None:
        """A model is loaded: where it holds more than was thought, that counts."""
        held = dict(self.budget.holds(name))
        if len(held) == 1 and memory_bytes > (thought := next(iter(held.values()))):
            logger.info("model %s holds %s, where %s were expected", name, gib(memory_bytes), gib(thought))
            self.budget.force(name, dict.fromkeys(held, memory_bytes))

    async def release(self, name: str) -> None:
        """A model's worker is gone."""
        self.budget.release(name)
        await self.tell_ledger()

    async def tell_ledger(self) -> None:
        """What all models hold now; that others have taken the memory is told in the log only."""
        try:
            await self._tell_ledger()
        except SlipstreamError as error:
            logger.warning("serving could not reserve its memory: %s", error.message)

    async def _tell_ledger(self) -> None:
        await asyncio.to_thread(self._reserve, self.budget.total())

    def _wanted(self, plan: ModelPlan, memory_fraction: float | None) -> dict[str, int]:
        wanted = self._measure(plan, self.capacity)
        for device, size in wanted.items():
            share = int((memory_fraction or 1.0) * self.capacity.get(device, 2**63))
            if size > share:
                raise OutOfMemory(
                    f"model {plan.name} needs about {gib(size)} of {device}; its memory_fraction is {gib(share)}",
                    metadata={"device": device, "needed_bytes": str(size), "left_bytes": str(share)},
                )
        return wanted

    def _victims(self, name: str, wanted: Mapping[str, int], *, may_evict: bool) -> tuple[str, ...]:
        unpinned = tuple(self._unpinned())
        idle = tuple(candidate for candidate in unpinned if self._is_idle(candidate.name))
        try:
            return self.budget.victims(name, wanted, idle if may_evict else ())
        except OutOfMemory as error:
            with contextlib.suppress(OutOfMemory):
                self.budget.victims(name, wanted, unpinned)
                # It would fit once they are idle: waiting helps.
                error.retry_after_s = _RETRY_AFTER_S
            raise

    def _unpinned(self) -> Iterator[Candidate]:
        for name, record in self._model_records.by_name.items():
            if not record.pinned and self._front.is_served(name):
                yield Candidate(name=name, last_used_s=self._front.last_used_s(name))

    def _is_idle(self, name: str) -> bool:
        is_settled = self._front.status(name).state in (ModelState.READY, ModelState.FAILED)
        return is_settled and self._front.is_idle(name)
