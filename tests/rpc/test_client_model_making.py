"""``client.models`` and ``slipstream models`` make, export and choose, against a real ModelService."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.rpc.models_kit import ModelService, folder, model_service

from slipstream_client import SlipstreamClient
from slipstream_client.errors import InvalidRequestError, NotFoundError
from slipstream_client.models import Progress

pytestmark = pytest.mark.asyncio(loop_scope="module")

GIB = 1024**3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ModelService]:
    async with model_service(tmp_path_factory.mktemp("client"), budget_bytes=64 * GIB) as running:
        folder(running.root, "base")
        await running.loaded("base")
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(service: ModelService) -> AsyncIterator[SlipstreamClient]:
    async with SlipstreamClient(inference_address=service.address) as opened:
        yield opened


async def run(service: ModelService, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "slipstream_client.cli", "models", *arguments, "--address", service.address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_an_export_arrives_whole(client: SlipstreamClient, service: ModelService, tmp_path: Path) -> None:
    seen: list[Progress] = []
    export = await client.models.export("base", tmp_path / "here", on_progress=seen.append)
    source = service.root / "base"
    assert (export.model, export.adapter_version) == ("models/base", "")
    assert {file.path for file in export.files} == {path.name for path in (tmp_path / "here").iterdir()}
    for file in export.files:
        assert (tmp_path / "here" / file.path).read_bytes() == (source / file.path).read_bytes()
    assert {progress.stage for progress in seen} == {"hashing", "receiving"}
    assert seen[-1].completed_count == seen[-1].total_count == sum(file.size_bytes for file in export.files)
    with pytest.raises(NotFoundError):
        await client.models.export("nothing", tmp_path / "there")
    assert not (tmp_path / "there").exists()


async def test_an_estimate_has_its_parts(client: SlipstreamClient) -> None:
    found = await client.models.estimate("qwen2-5-7b-instruct", quantization="nf4", context_tokens=4096)
    parts = (found.weights_bytes, found.kv_cache_bytes, found.adapter_bytes, found.overhead_bytes)
    assert sum(parts) == found.total_bytes
    assert found.parameter_count == 7_615_616_512
    assert found.options is not None
    assert (found.options["quantization"], found.options["context_tokens"]) == ("nf4", 4096)
    assert [other.quantization for other in found.alternatives] == ["none", "none", "int8"]
    with pytest.raises(InvalidRequestError, match=r"options\.quantization"):
        await client.models.estimate("gpt2", quantization="5bit")
    with pytest.raises(TypeError, match="colour"):
        await client.models.estimate("gpt2", colour="blue")


async def test_recommendations_come_with_reasons(client: SlipstreamClient) -> None:
    found = await client.models.recommend("ner", memory_bytes=4 * GIB)
    assert [one.entry.id for one in found if one.entry] == ["bert-base-ner", "distilbert-ner"]
    assert any("CoNLL-2003" in reason for reason in found[0].reasons)
    with pytest.raises(InvalidRequestError, match="task"):
        await client.models.recommend("mind-reading")


async def test_a_model_is_checked_before_it_is_made(client: SlipstreamClient) -> None:
    with pytest.raises(InvalidRequestError, match="configuration"):
        await client.models.create("never")
    with pytest.raises(InvalidRequestError, match="num_hidden_layers"):
        await client.models.create("never", config_source="base", config_overrides={"num_hiden_layers": 1})


@pytest.mark.slow
async def test_the_command_line_makes_exports_and_chooses(service: ModelService, tmp_path: Path) -> None:
    override = ("--set", "num_hidden_layers=1", "--set", "tie_word_embeddings=true")
    code, out, err = await run(service, "create", "cut", "--from", "base", *override, "--seed", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["state"] == "unloaded"
    code, out, err = await run(service, "export", "cut", str(tmp_path / "cut"), "--json")
    assert code == 0, err
    last = json.loads(out.splitlines()[-1])
    assert (last["event"], last["export"]["model"]) == ("exported", "models/cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["tie_word_embeddings"]) == (1, True)
    code, out, err = await run(service, "estimate", "cut", "--dtype", "bfloat16")
    assert code == 0, err
    assert "bfloat16 on cpu" in out
    code, out, err = await run(service, "recommend", "summarization", "--memory", "8G", "-n", "1", "--json")
    assert code == 0, err
    assert [json.loads(line)["entry"]["id"] for line in out.splitlines()] == ["bart-cnn"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "x", "--from", "base", "--set", "layers"), "NAME=VALUE"),
        (("export", "base", "--max-shard", "huge"), "huge"),
        (("recommend", "ner", "--memory", "-1G"), "-1G"),
        (("recommend", "mind-reading"), "mind-reading"),
        (("estimate", "no-such-model"), "no-such-model"),
    ],
)
async def test_a_bad_argument_is_named(service: ModelService, arguments: tuple[str, ...], said: str) -> None:
    code, _, err = await run(service, *arguments)
    assert code != 0
    assert said in err
