"""What a training would take, before anything runs: memory on each device, steps, tokens. Event loop and threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slipstream_server.storage.device_ledger import DeviceLedger
from slipstream_server.training.memory import TrainingMemory
from slipstream_server.training.specification import JobSpec
from slipstream_server.training.validation import Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """``available_bytes`` is what the device with the most has left; steps and tokens are 0 without a dataset."""

    spec: JobSpec
    memory: TrainingMemory
    available_bytes: int
    total_steps: int
    epoch_tokens: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available_bytes


def estimate(checked: Checked, ledger: DeviceLedger, capacity_bytes: Mapping[str, int]) -> Estimate:
    """The figures of a checked specification. Blocks on the ledger for milliseconds."""
    devices = [name for name in capacity_bytes if name.startswith(checked.device)]
    left = [capacity_bytes[name] - ledger.reserved_bytes(name) for name in devices]
    total_steps = epoch_tokens = 0
    if (data := checked.data) is not None:
        held_out = 0 if data.has_evaluation_file else round(checked.spec.evaluation_fraction * data.num_train_rows)
        num_rows = max(1, data.num_train_rows - held_out)
        schedule = checked.spec.hyperparameters.schedule
        total_steps, _ = schedule(num_examples=num_rows, world_size=checked.spec.num_processes)
        epoch_tokens = data.num_tokens
    return Estimate(
        spec=checked.spec,
        memory=checked.memory,
        available_bytes=max([0, *left]),
        total_steps=total_steps,
        epoch_tokens=epoch_tokens,
    )
