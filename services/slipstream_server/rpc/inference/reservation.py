"""What serving reserves in the machine's device ledger, so that training does not take it.

On GPUs at least the configured share of each that a model is put on; on the CPU what the models hold. Blocks for
milliseconds, or as long as the driver's tool takes; run it in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from slipstream_server.config import InferenceConfig
from slipstream_server.models.devices import CPU
from slipstream_server.storage.device_ledger import DeviceLedger

NAME = "inference"


def reserving(
    ledger: DeviceLedger, config: InferenceConfig, capacity: Mapping[str, int]
) -> Callable[[Mapping[str, int]], None]:
    """Reserves for what all models hold, in place of what was reserved before; ends with this process.

    It raises OutOfMemory, with the numbers, where others have it.
    """

    def reserve(held: Mapping[str, int]) -> None:
        ledger.reserve(NAME, wanted_bytes(config, held, capacity), capacity)

    return reserve


def wanted_bytes(config: InferenceConfig, held: Mapping[str, int], capacity: Mapping[str, int]) -> dict[str, int]:
    """Bytes by device, where the models hold ``held``."""
    return {device: _share(config, device, size, capacity) for device, size in held.items() if device in capacity}


def budget_bytes(config: InferenceConfig, capacity: Mapping[str, int]) -> dict[str, int]:
    """How much of each device the models may hold together."""
    if config.memory_budget_bytes is not None:
        return dict.fromkeys(capacity, config.memory_budget_bytes)
    return {device: int(config.memory_fraction * size) for device, size in capacity.items()}


def _share(config: InferenceConfig, device: str, held_bytes: int, capacity: Mapping[str, int]) -> int:
    if device == CPU or not held_bytes:
        return held_bytes
    return max(held_bytes, int(config.memory_fraction * capacity[device]))
