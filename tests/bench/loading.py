"""What loading a second model costs those who stream from the first.

    python -m tests.bench.loading [--model NAME] [--clients 16] [--pairs 5] [--save]

second_model_loads   16 clients stream from one model without a pause; time between two deltas of a stream (p99) while a
                     second model is read and packed, against as many seconds in which nothing is loaded. No stream may
                     fail
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from tests.bench.report import Comparison, emit, interleaved
from tests.bench.service import inference_service

from slipstream_client import RetryPolicy, SlipstreamClient

SEED = 20261
NEW_TOKENS = 64
SECOND = "second"
PROMPT = "Tell me about rivers, stones and morning light in quiet gardens."


@dataclass
class Streams:
    """Clients that stream for ever, what they saw between two deltas, and how many of them failed."""

    gaps_ms: list[float] = field(default_factory=list)
    failures: int = 0

    async def read(self, client: SlipstreamClient, model: str, number: int) -> None:
        """One client's endless life."""
        while True:
            last_s = None
            try:
                async with client.stream_generate(
                    f"{number}. {PROMPT}", model=model, do_sample=False, max_new_tokens=NEW_TOKENS, ignore_eos=True
                ) as stream:
                    async for _ in stream:
                        now_s = time.perf_counter()
                        if last_s is not None:
                            self.gaps_ms.append(1000 * (now_s - last_s))
                        last_s = now_s
            except Exception:
                self.failures += 1

    @contextlib.asynccontextmanager
    async def running(self, client: SlipstreamClient, model: str, num_clients: int) -> AsyncIterator[None]:
        """All clients, ended at the end."""
        tasks = [asyncio.create_task(self.read(client, model, number)) for number in range(num_clients)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def p99_ms_during(self, work: Callable[[], Awaitable[None]]) -> float:
        """The 99th percentile of the gaps that end while ``work`` runs."""
        first = len(self.gaps_ms)
        await work()
        return statistics.quantiles(self.gaps_ms[first:], n=100)[98]


async def measure(address: str, *, num_clients: int, pairs: int) -> tuple[list[float], list[float], dict[str, object]]:
    """1/p99 while a second model loads, 1/p99 while none does, and what else there is to tell."""
    streams, load_s = Streams(), []
    async with SlipstreamClient(inference_address=address, retries=RetryPolicy(max_attempts=1)) as client:
        first = (await client.models.list())[0]

        async def load() -> None:
            began_s = time.perf_counter()
            await client.models.load(SECOND, source=first.source)
            await client.models.wait(SECOND)
            load_s.append(time.perf_counter() - began_s)

        async def loading() -> float:
            p99_ms = await streams.p99_ms_during(load)
            await client.models.unload(SECOND, grace_s=0)
            await client.models.wait(SECOND)
            return 1 / p99_ms

        async def quiet() -> float:
            return 1 / await streams.p99_ms_during(lambda: asyncio.sleep(load_s[-1]))

        async with streams.running(client, first.name, num_clients):
            ours, theirs = await interleaved(loading, quiet, pairs=pairs)
    told = {
        "failures": streams.failures,
        "loading_p99_ms": round(1 / statistics.median(ours), 1),
        "quiet_p99_ms": round(1 / statistics.median(theirs), 1),
        "load_median_s": round(statistics.median(load_s), 1),
        "clients": num_clients,
        "model": first.name,
        "device": first.devices[0],
        "dtype": first.data_type,
        "batching": first.batching,
    }
    return ours, theirs, told


async def bench(model: str, *, num_clients: int, pairs: int, save: bool) -> None:
    """The one workload."""
    async with inference_service(model, "--max-batch-size", str(num_clients)) as address:
        ours, theirs, told = await measure(address, num_clients=num_clients, pairs=pairs)
    line = Comparison(
        bench="serving",
        workload="second_model_loads",
        side=str(told.pop("batching")),
        versus="base",
        ours=ours,
        theirs=theirs,
        unit="1/ms, inter-token p99",
        seed=SEED,
        device=str(told.pop("device")),
        dtype=str(told.pop("dtype")),
        extra=told,
    ).line()
    emit(line, save=save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the line in tests/bench/results")
    arguments = parser.parse_args()
    asyncio.run(bench(arguments.model, num_clients=arguments.clients, pairs=arguments.pairs, save=arguments.save))


if __name__ == "__main__":
    main()
