"""Real services under mixed traffic for minutes: memory stays flat, every request ends exactly once, nothing stays.

    python -m tests.faults.soak [--minutes 20] [--clients 16] [--seed 1] [--pool-tokens 4096] [--kinds KIND ...]
                                [--json] [--save]

Starts the adapter registry, inference (a tiny decoder by continuous batches, a tiny classifier) and chat as processes
of their own. KV memory is small, so that requests of all priorities are put back for others and begin again. When
everybody has gone, what the service counted must agree with what its clients saw (``soak_books``). Exit status 1 where
a promise was broken, with the reasons in ``problems``. ``--json`` prints everything in one line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from safetensors.numpy import save
from tests.bench.report import keep, surroundings
from tests.rpc.adapters_kit import chunk_messages, header_message
from tests.unit.adapters.lora_files import CONFIG, WEIGHTS, peft_config

from e2e.services import Running, chat_stub, inference_flags, inference_stub, service
from e2e.tiny_model import write_tiny_model
from faults.soak_books import HASTY, Counted, disagreements
from faults.soak_traffic import ADAPTERS, KINDS, LONG_ANSWER_TOKENS, LONG_PROMPT_TOKENS, Traffic
from slipstream.adapters.v1 import adapter_service_pb2 as adapters_pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc

SAMPLE_EVERY_S = 1.0
SETTLE_TIMEOUT_S = 30.0
# Of the medians of the last and of the first sixth after the warm-up third; allocators keep a little.
MOST_GROWTH_BYTES = 32 << 20
MOST_CHANGED_SHARE = 0.01
# Room for the longest request, not for half of the long ones that the clients may have at once; and kept prefixes fill
# it before memory is judged.
POOL_TOKENS = 4096
LONG_TOKENS = LONG_PROMPT_TOKENS[1] + LONG_ANSWER_TOKENS[1]
HIDDEN, RANK, LAYERS = 64, 4, 2


@dataclass(slots=True)
class Memory:
    """Bytes of its own that each process holds over time."""

    processes: dict[str, psutil.Process]
    samples: dict[str, list[int]] = field(default_factory=dict)

    async def follow(self) -> None:
        """A sample of each, now and then. Never returns."""
        while True:
            for name, process in self.processes.items():
                self.samples.setdefault(name, []).append(own_bytes(process.pid))
            await asyncio.sleep(SAMPLE_EVERY_S)

    def growth_bytes(self, name: str) -> int:
        """From the first sixth after the warm-up third to the last sixth."""
        samples = self.samples[name]
        sixth = max(1, len(samples) // 6)
        return int(statistics.median(samples[-sixth:]) - statistics.median(samples[2 * sixth : 3 * sixth]))

    def curve_mib(self, name: str) -> list[int]:
        """Twelve samples over the whole time, and the last."""
        samples = self.samples[name]
        return [round(sample / (1 << 20)) for sample in (*samples[:: max(1, len(samples) // 12)], samples[-1])]

    def mib_per_minute(self, name: str) -> float:
        """Slope after the warm-up third."""
        judged = self.samples[name][len(self.samples[name]) // 3 :]
        if len(judged) < 2:
            return 0.0
        return float(np.polyfit(np.arange(len(judged)) * SAMPLE_EVERY_S / 60, judged, 1)[0]) / (1 << 20)


def own_bytes(pid: int) -> int:
    """Anonymous memory, in RAM or swapped out: what a busy machine takes away from a process is no shrinking of it."""
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(1024 * int(words[1]) for words in fields if words[0] in ("RssAnon:", "VmSwap:"))


@dataclass(frozen=True, slots=True)
class Stage:
    """The services and their stubs."""

    inference: Running
    chat: Running
    traffic: Traffic

    def processes(self) -> dict[str, psutil.Process]:
        found = {"front": psutil.Process(self.inference.pid), "chat": psutil.Process(self.chat.pid)}
        return found | {f"worker_{place}": worker for place, worker in enumerate(self.inference.workers())}


@asynccontextmanager
async def stage(folder: Path, pool_tokens: int) -> AsyncIterator[Stage]:
    """All services, with adapters published."""
    from tests.parity.encoder_models import write_model

    tiny = write_tiny_model(folder / "tiny")
    judge = write_model("bert-classes", folder / "judge")
    flags = inference_flags(f"tiny={tiny}", "--model", f"judge={judge}", "--max-batch-tokens", str(pool_tokens))
    async with service("adapters", folder / "registry") as registry:
        async with grpc.aio.insecure_channel(registry.address) as channel:
            await publish(adapter_grpc.AdapterServiceStub(channel))
        async with (
            service("inference", folder / "inference", *flags, "--adapters-address", registry.address) as inference,
            service("chat", folder / "chat", "--inference-address", inference.address) as chat,
            grpc.aio.insecure_channel(inference.address) as channel,
            grpc.aio.insecure_channel(chat.address) as chat_channel,
        ):
            yield Stage(inference, chat, Traffic(inference_stub(channel), chat_stub(chat_channel)))


async def publish(stub: Any) -> None:
    """A live version of every adapter."""
    for seed, name in enumerate((*ADAPTERS, HASTY)):
        files = adapter_files(seed)
        header = header_message(name, files, create_missing=True, base_model="models/tiny")
        await stub.UploadAdapter(iter([header, *chunk_messages(files, 100_000)]))
        await stub.SetAdapterAlias(adapters_pb2.SetAdapterAliasRequest(name=f"{name}@live", version="v1"))


def adapter_files(seed: int) -> dict[str, bytes]:
    """A LoRA of noise for the tiny model's queries."""
    dice = np.random.default_rng(seed)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": dice.normal(0, 0.1, shape).astype(
            np.float32
        )
        for layer in range(LAYERS)
        for part, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK)))
    }
    config = peft_config(target_modules=["q_proj"], base_model_name_or_path="models/tiny")
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save(weights, metadata={"format": "pt"})}


async def soak(*, minutes: float, clients: int, seed: int, pool_tokens: int, kinds: list[str]) -> dict[str, Any]:
    """The line to print."""
    with tempfile.TemporaryDirectory(prefix="slipstream-soak-") as folder:
        async with stage(Path(folder), pool_tokens) as on:
            for kind in kinds:  # each once, so that what is loaded on first use is there
                await on.traffic.one(kind, random.Random(seed))
            memory = Memory(on.processes())
            following = asyncio.create_task(memory.follow())
            until_s = time.monotonic() + 60 * minutes
            lives = [on.traffic.client(seed + n, kinds, lambda: time.monotonic() < until_s) for n in range(clients)]
            await asyncio.gather(*lives)
            following.cancel()
            left = await settle(on.inference)
            problems = [f"{name} is {value:g} when nobody is there" for name, value in left.items()]
            if "long" in kinds and clients * LONG_TOKENS > 2 * pool_tokens and not preemptions(on.inference):
                problems.append("nobody was ever put back for want of KV memory")
            asked = {"minutes": minutes, "clients": clients, "seed": seed, "pool_tokens": pool_tokens}
            return summary(on, memory, problems, **asked)


async def settle(inference: Running) -> dict[str, float]:
    """What still runs or is held when everybody has gone; empty when nothing is."""
    until_s = time.monotonic() + SETTLE_TIMEOUT_S
    while (left := remains(inference)) and time.monotonic() < until_s:
        await asyncio.sleep(0.1)
    return left


def remains(inference: Running) -> dict[str, float]:
    names = ("rpc_calls_running", "num_requests_running", "num_requests_waiting", "kv_cache_tokens")
    # The scrape is no call of these, and health watches are none of ours.
    return {name: value for name in names if (value := inference.metric(f"slipstream_{name}"))}


def preemptions(inference: Running) -> float:
    return inference.metric("slipstream_num_preemptions_total")


def summary(on: Stage, memory: Memory, problems: list[str], **asked: Any) -> dict[str, Any]:
    """Counts, memory, and every broken promise; those that were found before are ``problems``."""
    traffic = on.traffic
    counted = Counted.of(on.inference.metrics(), generator="tiny", judge="judge")
    problems += disagreements(traffic.seen, counted)
    restarts = on.inference.metric("slipstream_worker_restarts_total")
    if restarts:
        problems.append(f"{restarts:g} workers died")
    for name in memory.samples:
        if (growth := memory.growth_bytes(name)) > MOST_GROWTH_BYTES:
            problems.append(f"{name} grew by {growth / (1 << 20):.0f} MiB")
    if traffic.changed > MOST_CHANGED_SHARE * traffic.repeated:
        problems.append(f"{traffic.changed} of {traffic.repeated} repeated greedy answers were others than before")
    problems += traffic.problems
    return {
        "bench": "soak",
        **asked,
        "device": "cpu",
        "dtype": "float32",
        **surroundings(),
        "calls": traffic.ends.total(),
        "ends": {f"{kind} {end}": count for (kind, end), count in sorted(traffic.ends.items())},
        "requests": {
            "finished": [counted.finished, traffic.seen.finished],
            "sequences": [counted.sequences.total(), traffic.seen.sequences.total()],
            "left": [counted.failures.total() - counted.failed(HASTY), traffic.seen.left.total()],
            "hasty": [counted.failed(HASTY), traffic.seen.unclear],
            "joined": counted.joined,
        },
        "tokens": traffic.tokens,
        "changed_answers": [traffic.changed, traffic.repeated],
        "own_mib": {name: memory.curve_mib(name) for name in memory.samples},
        "own_mib_per_minute": {name: round(memory.mib_per_minute(name), 2) for name in memory.samples},
        "preemptions": preemptions(on.inference),
        "is_sound": not problems,
        "problems": problems[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pool-tokens", type=int, default=POOL_TOKENS, help="tokens that KV memory holds")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of calls; all of them")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of one line for each fact")
    parser.add_argument("--save", action="store_true", help="keep the line in tests/bench/results")
    asked = vars(parser.parse_args())
    as_json, is_kept = asked.pop("json"), asked.pop("save")
    line = asyncio.run(soak(**asked))
    print(json.dumps(line) if as_json else "\n".join(f"{name}: {value}" for name, value in line.items()), flush=True)
    if is_kept:
        keep(line)
    return 0 if line["is_sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
