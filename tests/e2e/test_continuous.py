"""Continuous batches behind gRPC, on a tiny real model: whoever comes is answered while others still are, and whoever
goes leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio

from e2e.services import Running, generate_request, inference_flags, inference_stub, read_deltas, service
from e2e.tiny_model import write_tiny_model
from slipstream.inference.v1 import model_service_pb2, model_service_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

Eventually = Callable[..., Awaitable[None]]
HELD = ("slipstream_kv_cache_tokens", "slipstream_num_requests_running", "slipstream_num_requests_waiting")


@dataclass(frozen=True, slots=True)
class Served:
    """The service, and stubs for it."""

    running: Running
    stub: Any
    models: Any

    def is_idle(self) -> bool:
        return not any(self.running.metric(name) for name in HELD)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("continuous")
    flags = inference_flags(write_tiny_model(folder / "tiny"))
    async with (
        service("inference", folder / "data", *flags) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield Served(running, inference_stub(channel), model_service_pb2_grpc.ModelServiceStub(channel))


async def tokens_of(served: Served, text: str, count: int) -> list[int]:
    answer = await served.stub.Generate(generate_request(text, count), timeout=60)
    return list(answer.completions[0].token_ids)


async def test_a_decoder_is_served_so_by_default(served: Served) -> None:
    model = await served.models.GetModel(model_service_pb2.GetModelRequest(name="tiny"))
    assert model.batching == model_service_pb2.BATCHING_CONTINUOUS


async def test_newcomers_are_answered_while_a_long_stream_runs(served: Served, assert_eventually: Eventually) -> None:
    alone = [await tokens_of(served, f"newcomer {number}", 6) for number in range(4)]
    long = served.stub.StreamGenerate(generate_request("the long one"))
    await read_deltas(long, 3)
    came = [await tokens_of(served, f"newcomer {number}", 6) for number in range(4)]
    # It was there before them and is there after them.
    assert await read_deltas(long, 3) == 3
    assert served.running.metric("slipstream_num_requests_running") == 1
    long.cancel()
    assert came == alone
    await assert_eventually(served.is_idle)


async def test_those_that_go_leave_no_row_and_no_block(served: Served, assert_eventually: Eventually) -> None:
    staying = served.stub.StreamGenerate(generate_request("who stays"))
    await read_deltas(staying, 3)

    async def out_of_patience() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.stub.Generate(generate_request("late " * 400), timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def change_of_mind() -> None:
        call = served.stub.StreamGenerate(generate_request("no longer " * 200))
        await read_deltas(call, 1)
        call.cancel()

    await asyncio.gather(*[go() for go in (out_of_patience, change_of_mind) for _ in range(4)])
    await assert_eventually(lambda: served.running.metric("slipstream_num_requests_running") == 1, timeout_s=5)
    assert await read_deltas(staying, 3) == 3
    staying.cancel()
    await assert_eventually(served.is_idle)
