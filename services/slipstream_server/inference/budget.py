"""Who holds how much of each device's memory, and who must go so that another may come.

    device_bytes[device] >= sum of what the tenants hold there (but for tenants that were let in without asking)

A tenant is a model by name, from the moment its load is allowed until its worker is gone; loads under way count. Which
tenants may be sent away (idle, not pinned) is the caller's knowledge. Pure, synchronous; the caller's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slipstream_server.errors import OutOfMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A tenant that may be sent away; ``last_used_s`` on any one clock."""

    name: str
    last_used_s: float


class MemoryBudget:
    """Memory by device, and its tenants. Devices that it was not told of have no bound."""

    def __init__(self, device_bytes: Mapping[str, int]) -> None:
        self.device_bytes = dict(device_bytes)
        self._held: dict[str, dict[str, int]] = {}

    def held_bytes(self, device: str) -> int:
        return sum(held.get(device, 0) for held in self._held.values())

    def left_bytes(self, device: str) -> int | None:
        """What is left of a device; below 0 where somebody was let in without asking; None where it has no bound."""
        bound = self.device_bytes.get(device)
        return None if bound is None else bound - self.held_bytes(device)

    def total(self) -> dict[str, int]:
        """What all tenants hold, by device."""
        devices = {device for held in self._held.values() for device in held}
        return {device: self.held_bytes(device) for device in sorted(devices)}

    def victims(self, name: str, wanted: Mapping[str, int], candidates: Sequence[Candidate]) -> tuple[str, ...]:
        """Whom to send away so that ``name`` may hold ``wanted``: the least recently used first, nobody needlessly.

        Raises OutOfMemory, with the numbers, where even all of them would not be enough.
        """
        freed: list[str] = []
        short = self._short(name, wanted, freed)
        for candidate in sorted(candidates, key=lambda candidate: candidate.last_used_s):
            if not short:
                break
            if candidate.name != name and any(self._held.get(candidate.name, {}).get(device) for device in short):
                freed.append(candidate.name)
                short = self._short(name, wanted, freed)
        if short:
            raise self._not_enough(name, wanted, next(iter(short)), freed)
        for spared in reversed(freed.copy()):
            others = [victim for victim in freed if victim != spared]
            if not self._short(name, wanted, others):
                freed = others
        return tuple(freed)

    def take(self, name: str, wanted: Mapping[str, int]) -> None:
        """``name`` holds ``wanted`` from now on, in place of what it held. Raises OutOfMemory."""
        self.victims(name, wanted, ())
        self.force(name, wanted)

    def force(self, name: str, wanted: Mapping[str, int]) -> None:
        """As ``take``, bound or no bound: for what holds the memory already, or was told to come whatever happens."""
        self._held[name] = dict(wanted)

    def release(self, name: str) -> None:
        """``name`` is gone; does nothing where it holds nothing."""
        self._held.pop(name, None)

    def holds(self, name: str) -> Mapping[str, int]:
        """What ``name`` holds, by device."""
        return self._held.get(name, {})

    def _short(self, name: str, wanted: Mapping[str, int], gone: Sequence[str]) -> dict[str, int]:
        """How much is missing, by device, once ``gone`` have left."""
        missing = {device: size - self._room(device, (name, *gone)) for device, size in wanted.items()}
        return {device: size for device, size in missing.items() if size > 0}

    def _room(self, device: str, gone: Sequence[str]) -> int:
        bound = self.device_bytes.get(device)
        if bound is None:
            return 2**63
        return bound - sum(held.get(device, 0) for name, held in self._held.items() if name not in gone)

    def _not_enough(self, name: str, wanted: Mapping[str, int], device: str, freed: Sequence[str]) -> OutOfMemory:
        needed, left = wanted[device], max(0, self._room(device, (name,)))
        could_be = max(0, self._room(device, (name, *freed)))
        budget = self.device_bytes[device]
        text = f"model {name} needs about {_mib(needed)} of {device}: {_mib(left)} of {_mib(budget)} are left"
        if could_be > left:
            text += f", and {_mib(could_be)} without the models that are idle and not pinned"
        metadata = {
            "device": device,
            "needed_bytes": str(needed),
            "left_bytes": str(left),
            "left_without_idle_models_bytes": str(could_be),
            "budget_bytes": str(budget),
        }
        return OutOfMemory(text, metadata=metadata)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 1024**2:,.0f} MiB"
