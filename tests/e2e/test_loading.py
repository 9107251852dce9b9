"""A second model loads while sixteen clients stream from the first: nobody fails, and nobody waits for it."""

from __future__ import annotations

import pytest
from tests.bench.loading import measure
from tests.bench.service import inference_service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


async def test_streams_go_on_while_a_second_model_loads() -> None:
    async with inference_service("smollm2-135m-instruct", "--max-batch-size", "16") as address:
        loading, quiet, told = await measure(address, num_clients=16, pairs=1)
    assert told["failures"] == 0
    # Reading and packing weights takes seconds: a stream that waited for it would show that, not a few steps more.
    assert max(loading) > max(quiet) / 10
