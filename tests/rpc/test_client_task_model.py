"""A task that no loaded model can do: `slipstream run` loads what the service proposes, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.rpc.models_kit import MODEL, ModelService, folder, model_service

from slipstream_client import NotFoundError, SlipstreamClient
from slipstream_client.cli import task_model
from slipstream_client.cli.task_model import with_model
from slipstream_client.errors import UnavailableError
from slipstream_server.models.cache import ModelCache
from slipstream_server.models.preparation import sentiment_recipe

HERE, ON_A_HUB = "minilm-sentiment", "distilbert-sst2"


def make_local(service: ModelService, name: str) -> None:
    """As if it had been pulled and made by today's recipe."""
    made = folder(service.root.parent / "pulled", name)
    pointer = {"folder": str(made), "source": "pypi", "revision": "1", "note": "", "recipe": sentiment_recipe()}
    ModelCache(service.root.parent / "cache").remember(name, pointer)


async def answered_by(client: SlipstreamClient, task: str) -> str:
    async def work(name: str) -> str:
        return name or (await client.tasks.run(task, "I love this")).model

    return await with_model(client, work)


async def test_what_is_on_the_machine_is_loaded_without_asking_a_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        model_service(tmp_path, budget_bytes=2**40) as service,
        SlipstreamClient(service.address) as client,
    ):
        make_local(service, HERE)
        assert await answered_by(client, "sentiment-analysis") == HERE
        assert await service.states() == {HERE: "READY"}
        said = capsys.readouterr()
        assert said.out == ""
        assert "no model that is loaded can do text-classification" in said.err
        assert f"loading {HERE}" in said.err


async def test_where_no_hub_answers_the_model_that_needs_none_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def as_proposed(client: SlipstreamClient, task: str, proposed: list[str]) -> list[str]:
        return proposed

    monkeypatch.setattr(task_model, "_nearest_first", as_proposed)
    async with model_service(tmp_path) as service, SlipstreamClient(service.address) as client:
        make_local(service, HERE)
        assert await answered_by(client, "sentiment-analysis") == HERE
        assert await service.states() == {ON_A_HUB: "FAILED", HERE: "READY"}
        assert f"model {ON_A_HUB}: no source has it now" in capsys.readouterr().err
        failed = await service.reached(ON_A_HUB, MODEL.STATE_FAILED)
        assert f"`slipstream models pull {HERE}`" in failed.error.message


async def test_a_model_that_is_on_its_way_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with model_service(tmp_path) as service, SlipstreamClient(service.address) as client:
        make_local(service, HERE)
        service.front.announce(HERE)  # as if somebody had asked for it a moment ago
        await service.load(HERE)
        assert await answered_by(client, "sentiment-analysis") == HERE
        assert ON_A_HUB not in capsys.readouterr().err


async def test_where_nothing_can_be_had_the_failure_says_why(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service, SlipstreamClient(service.address) as client:
        with pytest.raises(UnavailableError, match="bert-base-ner: no source has it now") as failed:
            await answered_by(client, "ner")
        assert failed.value.reason == "DEPENDENCY_UNAVAILABLE"


async def test_the_refusal_names_what_to_load(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service, SlipstreamClient(service.address) as client:
        with pytest.raises(
            NotFoundError, match=f"; `slipstream models load {ON_A_HUB}` or `slipstream models load {HERE}`"
        ) as refused:
            await client.tasks.run("sentiment-analysis", "I love this")
        assert refused.value.metadata == {"task": "text-classification", "proposed_models": f"{ON_A_HUB},{HERE}"}
        with pytest.raises(NotFoundError) as refused:
            await client.tasks.run("feature-extraction", "I love this")
        assert refused.value.metadata["proposed_models"] == "minilm-l6-v2"  # its own second source is no hub
