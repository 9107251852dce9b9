"""KV memory on GPUs: a share of each device less what is used; numbers are made up."""

from __future__ import annotations

import pytest
import torch

from slipstream_server.errors import OutOfMemory
from slipstream_server.inference.engine.kv_budget import blocks_within

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
MIB = 1024**2


def test_blocks_take_what_the_share_leaves() -> None:
    # 900 of 1000 MiB may be used, 300 are: 600 MiB are 300 blocks, one of which is nobody's.
    memory = {FIRST: (700 * MIB, 1000 * MIB)}
    assert blocks_within(0.9, {FIRST: 2 * MIB}, memory, most_blocks=10_000, least_blocks=1) == 299


def test_no_more_blocks_than_anybody_could_use() -> None:
    memory = {FIRST: (700 * MIB, 1000 * MIB)}
    assert blocks_within(0.9, {FIRST: 2 * MIB}, memory, most_blocks=40, least_blocks=1) == 40


def test_the_fullest_device_decides() -> None:
    memory = {FIRST: (700 * MIB, 1000 * MIB), SECOND: (300 * MIB, 1000 * MIB)}
    block_bytes = {FIRST: 2 * MIB, SECOND: MIB}
    assert blocks_within(0.9, block_bytes, memory, most_blocks=10_000, least_blocks=1) == 199


@pytest.mark.parametrize("free_mib", [90, 109, 0])
def test_too_little_is_refused_with_the_numbers(free_mib: int) -> None:
    memory = {FIRST: (free_mib * MIB, 1000 * MIB)}
    with pytest.raises(OutOfMemory, match=rf"0\.9 of cuda:0 \(1000 MiB\).*{1000 - free_mib} MiB in use"):
        blocks_within(0.9, {FIRST: MIB}, memory, most_blocks=10, least_blocks=10)


def test_just_enough_is_taken() -> None:
    memory = {FIRST: (111 * MIB, 1000 * MIB)}
    assert blocks_within(0.9, {FIRST: MIB}, memory, most_blocks=10, least_blocks=10) == 10
