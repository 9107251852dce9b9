"""An inference service on the engine that does nothing, a chat service before it, and a stranger for each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from e2e.services import Running, inference_flags, service
from e2e.stranger import Stranger, stranger
from e2e.tiny_model import write_tiny_model

CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Services:
    """Both services, running."""

    inference: Running
    chat: Running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    folder: Path = tmp_path_factory.mktemp("services")
    model = write_tiny_model(folder / "tiny", context_tokens=CONTEXT_TOKENS)
    async with (
        service("inference", folder / "inference", *inference_flags(model, "--batching", "null")) as inference,
        service("chat", folder / "chat", "--inference-address", inference.address) as chat,
    ):
        yield Services(inference, chat)


@pytest.fixture
def inference(services: Services) -> Iterator[Stranger]:
    with stranger(services.inference.address) as client:
        yield client


@pytest.fixture
def chat(services: Services) -> Iterator[Stranger]:
    with stranger(services.chat.address) as client:
        yield client
