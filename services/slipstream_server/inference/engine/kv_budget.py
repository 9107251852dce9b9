"""How many blocks of KV memory a model on GPUs gets: what its share of each device leaves once it is loaded.

Called when weights are there and a first full step has run, so that what steps need beside the blocks counts as used.
Pure but for ``device_memory``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slipstream_server.errors import OutOfMemory

_MIB = 1024**2


def device_memory(devices: Mapping[torch.device, int]) -> dict[torch.device, tuple[int, int]]:
    """Free and whole bytes of these GPUs, whoever uses them."""
    return {device: torch.cuda.mem_get_info(device) for device in devices}


def blocks_within(
    fraction: float,
    block_bytes: Mapping[torch.device, int],
    memory: Mapping[torch.device, tuple[int, int]],
    *,
    most_blocks: int,
    least_blocks: int,
) -> int:
    """Blocks that fit on every device into ``fraction`` of it, of which others and the weights have their part; at
    most ``most_blocks``, more than which nobody could use. One further block, which belongs to nobody, is allowed for.

    Raises OutOfMemory, with the numbers, where ``least_blocks`` do not fit.
    """
    fitting = most_blocks
    for device, size in block_bytes.items():
        free, total = memory[device]
        left = int(fraction * total) - (total - free)
        fitting = min(fitting, left // size - 1)
        if fitting < least_blocks:
            raise OutOfMemory(
                f"memory_fraction {fraction:g} of {device} ({total // _MIB} MiB) leaves {left // _MIB} MiB for keys and"
                f" values beside {(total - free) // _MIB} MiB in use; at least {(least_blocks + 1) * size // _MIB + 1}"
                " MiB are needed"
            )
    return fitting
