"""Serving over gRPC: batching on against one at a time, and what the hop itself costs.

    python -m tests.bench.serving [--model NAME] [--pairs 5] [--save]

closed_16x64      16 prompts of 16 to 128 tokens at once, 64 new tokens each, end-of-sequence ignored; output tokens/s
                  against the same requests one at a time
closed_16xmixed   the same with 8 to 96 new tokens each: nobody takes a finished row's place until the batch ends
hop_null_engine   one token from an engine that does nothing: over gRPC, against calling the front in this process
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.bench.report import Comparison, emit, interleaved
from tests.bench.service import inference_service

from slipstream_client import SlipstreamClient
from slipstream_server.inference.calls import GenerateCall, StoppingChoice, TokenPrompt
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.supervisor import ModelState
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.models.sources import resolve

SEED = 20260
NUM_PROMPTS = 16
TEXT = "river stone light paper engine quiet morning garden number window silver market travel music winter"


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as ids, and how many tokens to produce."""

    prompt: Sequence[int]
    max_new_tokens: int


async def workload(client: SlipstreamClient, *, mixed: bool) -> list[Request]:
    """The same requests for the same seed and tokenizer."""
    random_source = random.Random(SEED)
    text = " ".join(random_source.choices(TEXT.split(), k=4096))
    ids = [token.id for token in (await client.tokenize(text)).tokens]
    requests = []
    for _ in range(NUM_PROMPTS):
        length = random_source.randint(16, 128)
        start = random_source.randrange(len(ids) - length)
        prompt = ids[start : start + length]
        requests.append(Request(prompt, random_source.randint(8, 96) if mixed else 64))
    return requests


async def run_together(client: SlipstreamClient, requests: Sequence[Request]) -> float:
    """Output tokens per second with all requests at once."""
    return await _rate(requests, asyncio.gather(*(_generate(client, request) for request in requests)))


async def run_one_by_one(client: SlipstreamClient, requests: Sequence[Request]) -> float:
    """Output tokens per second with one request at a time."""

    async def one_by_one() -> list[int]:
        return [await _generate(client, request) for request in requests]

    return await _rate(requests, one_by_one())


async def _rate(requests: Sequence[Request], work: object) -> float:
    start_s = time.perf_counter()
    counts: list[int] = await work  # type: ignore[misc]
    elapsed_s = time.perf_counter() - start_s
    assert counts == [request.max_new_tokens for request in requests]
    return sum(counts) / elapsed_s


async def _generate(client: SlipstreamClient, request: Request) -> int:
    answer = await client.generate(
        request.prompt, do_sample=False, max_new_tokens=request.max_new_tokens, ignore_eos=True, timeout_s=600
    )
    return answer.usage.completion_tokens


async def bench_batching(model: str, pairs: int, *, save: bool) -> None:
    """Both closed workloads on one service."""
    async with (
        inference_service(model, "--max-batch-size", str(NUM_PROMPTS)) as address,
        SlipstreamClient(inference_address=address) as client,
    ):
        served = (await client.models.list())[0]
        for name, mixed in (("closed_16x64", False), ("closed_16xmixed", True)):
            requests = await workload(client, mixed=mixed)
            ours, theirs = await interleaved(
                lambda requests=requests: run_together(client, requests),  # type: ignore[misc]
                lambda requests=requests: run_one_by_one(client, requests),  # type: ignore[misc]
                pairs=pairs,
            )
            line = Comparison(
                bench="serving",
                workload=name,
                side="padded",
                versus="one_at_a_time",
                ours=ours,
                theirs=theirs,
                unit="output tokens/s",
                seed=SEED,
                device=served.devices[0],
                dtype=served.data_type,
                extra={"model": served.name},
            ).line()
            emit(line, save=save)


async def bench_hop(model: str, *, save: bool, calls: int = 400) -> None:
    """Latency of one token from an engine that does nothing: over gRPC, and by calling the front in this process."""
    async with (
        inference_service(model, "--batching", "null") as address,
        SlipstreamClient(inference_address=address) as client,
        null_front(model) as front,
    ):
        call = GenerateCall(prompt=TokenPrompt(token_ids=(1, 2, 3)), stopping=StoppingChoice(max_new_tokens=1))

        async def over_grpc() -> None:
            await client.generate([1, 2, 3], max_new_tokens=1)

        async def directly() -> None:
            async with await front.open(call) as events:
                assert [event async for event in events]

        await milliseconds(over_grpc), await milliseconds(directly)
        pairs = [(await milliseconds(over_grpc), await milliseconds(directly)) for _ in range(calls)]
    grpc_ms, direct_ms = ([pair[side] for pair in pairs[calls // 4 :]] for side in (0, 1))
    line = Comparison(
        bench="serving",
        workload="hop_null_engine",
        side="grpc",
        versus="floor",
        ours=[1 / latency for latency in grpc_ms],
        theirs=[1 / latency for latency in direct_ms],
        unit="calls per ms",
        seed=SEED,
        device="cpu",
        dtype="none",
        extra={
            "grpc_p50_ms": round(statistics.median(grpc_ms), 3),
            "grpc_p99_ms": round(statistics.quantiles(grpc_ms, n=100)[98], 3),
            "direct_p50_ms": round(statistics.median(direct_ms), 3),
            "hop_p50_ms": round(statistics.median(g - d for g, d in zip(grpc_ms, direct_ms, strict=True)), 3),
        },
    ).line()
    emit(line, save=save)


async def milliseconds(run: Callable[[], Awaitable[None]]) -> float:
    """How long one call takes."""
    start_s = time.perf_counter()
    await run()
    return 1000 * (time.perf_counter() - start_s)


@contextlib.asynccontextmanager
async def null_front(model: str) -> AsyncIterator[InferenceFront]:
    """A front in this process whose worker's engine does nothing."""
    folder = (await asyncio.to_thread(resolve, model)).folder
    front = InferenceFront(FrontConfig())
    await front.start()
    try:
        worker = WorkerConfig(model_folder=folder, engine="null")
        front.add_model(ModelPlan(name="null", folder=folder, facts=read_facts(folder), worker=worker))
        async for statuses in front.subscribe():
            if statuses[0].state is ModelState.READY:
                break
        yield front
    finally:
        await front.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the lines in tests/bench/results")
    arguments = parser.parse_args()
    await bench_hop(arguments.model, save=arguments.save)
    await bench_batching(arguments.model, arguments.pairs, save=arguments.save)


if __name__ == "__main__":
    asyncio.run(main())
