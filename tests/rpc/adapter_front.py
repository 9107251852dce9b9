"""An inference service with a tiny model and a worker of its own, beside a real adapter registry; and what PeftModel
alone answers in its place.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from tests.rpc.adapters_kit import AdapterClient
from tests.unit.engine.adapter_folders import peft_alone, pin, save_adapter
from tests.unit.models.tokenizer_folders import byte_level, save_folder
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.adapters.v1 import adapter_service_pb2 as adapters_pb2
from slipstream.inference.v1 import inference_service_pb2 as pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.type.v1 import generation_pb2
from slipstream_server.adapters.fitting import ServingBase
from slipstream_server.config import ListenConfig
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.supervisor import RestartPolicy
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.rpc.channels import Peer
from slipstream_server.rpc.inference.adapters import front_adapters
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount, open_server

VOCAB = 400
NUM_TOKENS = 6
BASE = "models/tiny"
PROMPT = (5, 17, 300, 42)


def save_base(folder: Path, hidden: int = 48) -> Path:
    """A seeded float64 model whose choices are far from ties, with a tokenizer."""
    save_folder(folder, byte_level())
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).double().save_pretrained(folder)
    return folder


class Oracle:
    """What each adapter answers alone, by number; None is the base."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(base).double().eval()
        self._folder = folder
        self.alone = functools.cache(self._alone)

    def adapter(self, number: int, **config: Any) -> dict[str, bytes]:
        """The files of a random adapter, as an upload takes them."""
        folder = self._folder / str(number)
        if not folder.is_dir():
            save_adapter(self.model, folder, seed=number, **config)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("adapter_")}

    def _alone(self, number: int | None, prompt: tuple[int, ...] = PROMPT) -> list[int]:
        chosen = None if number is None else pin(self._folder / str(number), number)
        return peft_alone(self.model, chosen, prompt, max_new_tokens=NUM_TOKENS)


@dataclass(frozen=True, slots=True)
class Inference:
    """A running service and shorthands."""

    front: InferenceFront
    stub: Any
    cache: Path

    async def generate(self, adapter: str = "", prompt: tuple[int, ...] = PROMPT) -> tuple[str, list[int]]:
        """Version and tokens of the answer."""
        response = await self.stub.Generate(
            pb2.GenerateRequest(
                token_ids=pb2.TokenIds(ids=prompt),
                adapter=adapter,
                stopping=generation_pb2.StoppingOptions(max_new_tokens=NUM_TOKENS, ignore_eos=True),
            )
        )
        return response.adapter_version, list(response.completions[0].token_ids)


@asynccontextmanager
async def inference(
    base: Path, registry_port: int, cache: Path, *, wait: bool = True, **worker: Any
) -> AsyncIterator[Inference]:
    """Ready to answer, and following the registry at that port."""
    front = InferenceFront(
        FrontConfig(restart=RestartPolicy(first_delay_s=0.01, max_delay_s=0.05), default_model="tiny")
    )
    peer = Peer(address=f"127.0.0.1:{registry_port}")
    config = WorkerConfig(model_folder=base, load=LoadOptions(device="cpu"), threads=1, **worker)
    plan = ModelPlan(name="tiny", folder=base, facts=read_facts(base), worker=config)
    async with front_adapters(peer, cache, lambda model: ServingBase(model=model, folder=base)) as adapters:
        front.use_adapters(adapters.resolve)
        watching = asyncio.create_task(adapters.watch.run())
        await front.start()
        try:
            front.add_model(plan)
            await _ready(front)
            mount = Mount(
                inference_grpc.add_InferenceServiceServicer_to_server,
                InferenceServicer(front),  # type: ignore[abstract]
            )
            async with open_server([mount], ListenConfig()) as server:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                    if wait:
                        await _following(front)
                    yield Inference(front, inference_grpc.InferenceServiceStub(channel), cache)
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await front.close()


async def _ready(front: InferenceFront) -> None:
    async with asyncio.timeout(90):
        async for statuses in front.subscribe():
            if statuses and statuses[0].state in ("ready", "failed"):
                assert statuses[0].state == "ready", statuses[0].error
                return


async def _following(front: InferenceFront) -> None:
    resolver = front._resolve_adapter
    async with asyncio.timeout(30):
        while not resolver._copy.is_filled:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)


async def publish(registry: AdapterClient, oracle: Oracle, *numbers: int, adapter: str = "support") -> None:
    """Upload the oracle's adapters in that order: v1, v2, ..."""
    for number in numbers:
        await registry.upload(adapter, oracle.adapter(number), chunk_bytes=100_000, base_model=BASE)


async def set_default(registry: AdapterClient, adapter: str) -> adapters_pb2.SetActiveAdapterResponse:
    return await registry.stub.SetActiveAdapter(adapters_pb2.SetActiveAdapterRequest(model="tiny", adapter=adapter))
