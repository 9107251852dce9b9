"""Clients by the hundred that vanish, cancel, stop reading or come all at once: nothing stays, nobody else suffers."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from e2e.services import (
    Running,
    chat_pb2,
    chat_stub,
    environment,
    generate_request,
    inference_flags,
    inference_stub,
    message_request,
    read_all,
    read_deltas,
    service,
)
from e2e.stranger import refusal_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Eventually = Callable[..., Awaitable[None]]
CROWD, CONNECTIONS, CANCELS, BURST = 500, 100, 1000, 3000
# What allocators and thread pools may keep after a crowd, per process.
SLACK_BYTES = 96 << 20


class Footprint:
    """Descriptors and memory of the front and its worker, and the calls they have."""

    def __init__(self, inference: Running) -> None:
        processes = [psutil.Process(inference.pid), inference.workers()[0]]
        self.descriptors = [process.num_fds() for process in processes]
        self.memory_bytes = [process.memory_info().rss for process in processes]
        self.num_calls = inference.metric("slipstream_rpc_calls_running")
        self.num_requests = inference.num_requests()
        self.kv_tokens = inference.metric("slipstream_kv_cache_tokens")

    def assert_as(self, before: Footprint) -> None:
        assert (self.num_calls, self.num_requests, self.kv_tokens) == (0, 0, 0)
        assert self.descriptors == before.descriptors
        for now, then in zip(self.memory_bytes, before.memory_bytes, strict=True):
            assert now < then + SLACK_BYTES


@asynccontextmanager
async def crowd(address: str, *, max_new_tokens: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with CROWD streams over CONNECTIONS connections."""
    script, tests = Path(__file__).with_name("crowd.py"), Path(__file__).parents[1]
    arguments = (str(script), address, str(CROWD), str(CONNECTIONS), str(max_new_tokens))
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env={**environment(), "PYTHONPATH": str(tests)}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_clients_that_vanish_leave_nothing_behind(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    async with (
        service("inference", tmp_path, *inference_flags(tiny_model)) as inference,
        grpc.aio.insecure_channel(inference.address) as channel,
    ):
        stub = inference_stub(channel)
        await stub.Generate(generate_request(max_new_tokens=3))
        before = Footprint(inference)
        for _ in range(2):
            async with crowd(inference.address, max_new_tokens=2000) as process:
                await assert_eventually(lambda: inference.num_requests() == CROWD, timeout_s=60)
                generated = inference.metric("slipstream_generation_tokens_total")
                await assert_eventually(
                    lambda generated=generated: inference.metric("slipstream_generation_tokens_total") > generated + 500
                )
                process.kill()
                await process.wait()
                await assert_eventually(lambda: inference.num_requests() == 0, timeout_s=2)
            await assert_eventually(lambda: Footprint(inference).assert_as(before) is None)
        assert (await stub.Generate(generate_request(max_new_tokens=3))).usage.completion_tokens == 3


async def test_a_thousand_cancels_at_random_moments(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    dice = random.Random(3)
    async with (
        service("inference", tmp_path, *inference_flags(tiny_model)) as inference,
        grpc.aio.insecure_channel(inference.address) as channel,
    ):
        stub = inference_stub(channel)
        await stub.Generate(generate_request(max_new_tokens=3))
        before = Footprint(inference)

        async def impatient(patience_s: float) -> str:
            call = stub.StreamGenerate(generate_request(max_new_tokens=dice.randint(1, 300)))
            try:
                async with asyncio.timeout(patience_s):
                    return str((await read_all(call))[-1].WhichOneof("event"))
            except TimeoutError:
                return "cancelled"
            finally:
                call.cancel()

        ends = Counter(await asyncio.gather(*[impatient(dice.uniform(0, 5)) for _ in range(CANCELS)]))
        assert set(ends) == {"cancelled", "finished"}
        await assert_eventually(lambda: Footprint(inference).assert_as(before) is None)


async def test_a_deadline_frees_the_row_directly_and_through_chat(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    async with (
        service("inference", tmp_path / "inference", *inference_flags(tiny_model)) as inference,
        service("chat", tmp_path / "chat", "--inference-address", inference.address) as chat,
        grpc.aio.insecure_channel(inference.address) as channel,
        grpc.aio.insecure_channel(chat.address) as chat_channel,
    ):
        stub, chats = inference_stub(channel), chat_stub(chat_channel)
        parent = (await chats.CreateConversation(chat_pb2.CreateConversationRequest())).name
        for call in (
            lambda: stub.Generate(generate_request(), timeout=0.2),
            lambda: read_all(stub.StreamGenerate(generate_request(), timeout=0.2)),
            lambda: chats.SendMessage(message_request(parent), timeout=0.4),
            lambda: read_all(chats.StreamMessage(message_request(parent), timeout=0.4)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await assert_eventually(lambda: inference.num_requests() == 0, timeout_s=2)
        assert chat.process.returncode is inference.process.returncode is None


async def test_a_reader_that_stops_reading_is_cut_off_and_nobody_waits_for_it(
    tmp_path: Path, boundless_model: Path, assert_eventually: Eventually
) -> None:
    flags = inference_flags(boundless_model, "--batching", "null", "--write-timeout-s", "1")
    # A window that does not grow: what the reader leaves unread stays with the server.
    closed_window = (("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0))
    async with (
        service("inference", tmp_path, *flags) as inference,
        grpc.aio.insecure_channel(inference.address, options=closed_window) as slow,
        grpc.aio.insecure_channel(inference.address) as channel,
    ):
        stub = inference_stub(channel)
        before = Footprint(inference)
        call = inference_stub(slow).StreamGenerate(generate_request(max_new_tokens=3_900_000))
        await read_deltas(call, 20)
        while inference.num_requests():
            assert (await stub.Generate(generate_request(max_new_tokens=20))).usage.completion_tokens == 20
            assert psutil.Process(inference.pid).memory_info().rss < before.memory_bytes[0] + SLACK_BYTES
        await assert_eventually(lambda: inference.metric("slipstream_rpc_calls_running") == 0)
        codes = [key for key in inference.metrics() if "StreamGenerate" in key and "duration_seconds_count" in key]
        assert len(codes) == 1
        assert 'code="RESOURCE_EXHAUSTED"' in codes[0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
        assert refusal_of(caught.value).reason == "SLOW_READER"


async def test_a_reader_that_stops_reading_slows_nobody_in_its_batch(
    tmp_path: Path, tiny_model: Path, assert_eventually: Eventually
) -> None:
    closed_window = (("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0))
    flags = inference_flags(tiny_model, "--write-timeout-s", "120")
    async with (
        service("inference", tmp_path, *flags) as inference,
        grpc.aio.insecure_channel(inference.address, options=closed_window) as slow,
        grpc.aio.insecure_channel(inference.address) as channel,
    ):
        stub = inference_stub(channel)

        async def gap_s() -> float:
            """Median time between two deltas of a stream that is read."""
            times = []
            async for event in stub.StreamGenerate(generate_request(max_new_tokens=150)):
                if event.HasField("delta"):
                    times.append(time.perf_counter())
            return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))

        await gap_s()
        call = inference_stub(slow).StreamGenerate(generate_request())
        await read_deltas(call, 5)
        other = inference_stub(channel).StreamGenerate(generate_request())
        reading = asyncio.create_task(read_all(other))
        # In company of one that stopped reading, and of one that reads: the same row, so the same price.
        unread = [await gap_s() for _ in range(5)]
        call.cancel()
        await assert_eventually(lambda: inference.num_requests() == 1)
        read = [await gap_s() for _ in range(5)]
        reading.cancel()
        assert statistics.median(unread) < 3 * statistics.median(read) + 0.005
        assert psutil.Process(inference.pid).memory_info().rss < 1 << 30
        await assert_eventually(lambda: inference.num_requests() == 0)


PROBE = """
import sys, time, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    while True:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        print(answer.status, flush=True)
        time.sleep(0.1)
"""


@pytest.mark.parametrize(("max_new_tokens", "num_connections"), [(20, 100), (400, 1)])
async def test_a_burst_is_accepted_or_told_when_to_come_back(
    tmp_path: Path, boundless_model: Path, assert_eventually: Eventually, max_new_tokens: int, num_connections: int
) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with service("inference", tmp_path, *inference_flags(boundless_model, "--batching", "null")) as inference:
        probe = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROBE, f"127.0.0.1:{inference.health_port}", stdout=asyncio.subprocess.PIPE
        )
        assert probe.stdout is not None
        await probe.stdout.readline()
        channels = [grpc.aio.insecure_channel(inference.address, options=options) for _ in range(num_connections)]
        stubs = [inference_stub(channel) for channel in channels]

        async def one(stub: Any) -> tuple[str, str, bool]:
            try:
                events = await read_all(stub.StreamGenerate(generate_request(max_new_tokens=max_new_tokens)))
            except grpc.aio.AioRpcError as error:
                refused = refusal_of(error)
                return refused.code, refused.reason, refused.retry_s is not None
            assert events[-1].finished.usage.completion_tokens == max_new_tokens
            return "OK", "", False

        ends = Counter(await asyncio.gather(*[one(stubs[i % num_connections]) for i in range(BURST)]))
        assert set(ends) <= {("OK", "", False), ("RESOURCE_EXHAUSTED", "QUEUE_FULL", True)}, ends
        assert ends["OK", "", False] > 0
        assert probe.returncode is None  # it would have ended at the first check that took a second
        probe.kill()
        await probe.wait()
        await asyncio.gather(*[channel.close() for channel in channels])
        await assert_eventually(lambda: inference.num_requests() == 0)
