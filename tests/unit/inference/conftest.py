"""A front over scripted workers."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.supervisor import RestartPolicy
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.inference.worker_process import WorkerLaunch
from slipstream_server.models.facts import ModelFacts, facts_of_config
from unit.models.tokenizer_folders import byte_level, save_folder

QUICK = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05, crash_loop_deaths=4, slow_retry_s=0.5)


def llama_facts(context_tokens: int = 4096, vocab_size: int = 400, **generation: object) -> ModelFacts:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "max_position_embeddings": context_tokens,
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    return facts_of_config(config, generation)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class FakeModel:
    """A front with one model, ``fake``, and what its workers were told."""

    front: InferenceFront
    log: Path
    registry: CollectorRegistry

    def lines(self) -> list[str]:
        return [line.split(" ", 1)[1] for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def pids(self) -> list[int]:
        return list(dict.fromkeys(int(line.split()[0]) for line in self.log.read_text().splitlines()))

    @property
    def state(self) -> str:
        return self.front.status("fake").state


OpenFront = Callable[..., AbstractAsyncContextManager[FakeModel]]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tokenizer"), byte_level())


@pytest.fixture
def open_front(tokenizer_folder: Path, tmp_path: Path) -> OpenFront:
    """``async with open_front(mode=..., ...) as fake``: started, loading, closed at the end."""

    @asynccontextmanager
    async def opened(
        *,
        mode: str = "serve",
        max_batch_size: int = 4,
        admission: AdmissionLimits | None = None,
        restart: RestartPolicy = QUICK,
        write_timeout_s: float = 30.0,
        facts: ModelFacts | None = None,
        folder: Path | None = None,
    ) -> AsyncIterator[FakeModel]:
        log, registry = tmp_path / "commands", CollectorRegistry()
        script = str(Path(__file__).with_name("fake_worker.py"))
        config = FrontConfig(admission=admission or AdmissionLimits(), restart=restart, write_timeout_s=write_timeout_s)
        front = InferenceFront(config, registry=registry)
        await front.start()
        try:
            front.add_model(
                ModelPlan(
                    name="fake",
                    folder=folder or tokenizer_folder,
                    facts=facts or llama_facts(),
                    worker=WorkerConfig(engine="null", max_batch_size=max_batch_size),
                    launch=WorkerLaunch(command=lambda socket: [sys.executable, script, str(socket), mode, str(log)]),
                )
            )
            yield FakeModel(front, log, registry)
        finally:
            await front.close()

    return opened
