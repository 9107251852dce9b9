"""The client's noun ``models`` and ``slipstream models ...`` against a real ModelService."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from tests.rpc.models_kit import ModelService, folder, model_service

from slipstream_client import SlipstreamClient
from slipstream_client.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    ResourceExhaustedError,
)


def client_of(service: ModelService) -> SlipstreamClient:
    return SlipstreamClient(inference_address=service.address)


async def test_a_model_is_loaded_followed_unloaded_and_deleted(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service, client_of(service) as client:
        folder(service.root, "tiny")
        asked = await client.models.load("tiny", context_tokens=64, pinned=True)
        assert asked.state in ("loading", "downloading")
        steps: list[str] = []
        model = await client.models.wait("tiny", on_change=lambda seen: steps.append(seen.state))
        assert (model.state, model.context_tokens, model.pinned, model.vocabulary_size) == ("ready", 64, True, 400)
        assert model.load_options == {"context_tokens": 64}
        assert steps[-1] == "ready"
        with pytest.raises(FailedPreconditionError):
            await client.models.unload("tiny")
        with pytest.raises(AbortedError):
            await client.models.unload("tiny", force=True, etag="0")
        await client.models.unload("tiny", force=True, grace_s=0.5, etag=model.etag)
        assert (await client.models.wait("tiny")).state == "unloaded"
        await client.models.delete("tiny")
        with pytest.raises(NotFoundError):
            await client.models.get("tiny")


async def test_waiting_raises_why_a_model_failed(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service, client_of(service) as client:
        await client.models.load("far", source="org/nowhere")
        with pytest.raises(Exception) as failed:
            await client.models.wait("far")
        assert failed.value.reason in ("DEPENDENCY_UNAVAILABLE", "MODEL_NOT_FOUND")
        error = (await client.models.get("far")).error
        assert error is not None
        assert error.reason == failed.value.reason


async def test_bad_arguments_are_named(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes={"tiny": 101}) as service, client_of(service) as client:
        folder(service.root, "tiny")
        with pytest.raises(InvalidRequestError, match=r"options\.quantization"):
            await client.models.load("tiny", quantization="5bit")
        with pytest.raises(TypeError, match="colour"):
            await client.models.load("tiny", colour="blue")
        with pytest.raises(ResourceExhaustedError, match="needs about"):
            await client.models.load("tiny")


async def test_the_command_line_loads_lists_and_deletes(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")

        async def run(*arguments: str) -> tuple[int, str, str]:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "slipstream_client.cli", "models", *arguments, "--address", service.address,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, err = await process.communicate()
            return process.returncode or 0, out.decode(), err.decode()

        code, out, _ = await run("load", "tiny", "--adapter-slots", "2", "--pin", "--json")
        loaded = json.loads(out)
        assert (code, loaded["state"], loaded["load_options"]) == (0, "ready", {"adapter_slot_count": 2})
        assert "tiny" in (await run("list"))[1]
        code, _, err = await run("unload", "tiny")
        assert (code, "pinned" in err) == (1, True)
        assert (await run("unload", "tiny", "--force"))[0] == 0
        assert json.loads((await run("delete", "tiny", "--json"))[1]) == {"deleted": "tiny"}
        assert await service.states() == {}
