"""What training jobs make over real gRPC: published once, under the right name, or left alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.rpc.training_kit import (
    Bench,
    State,
    TrainingClient,
    states,
)

from slipstream_server.errors import DependencyUnavailable, GateClosed, IncompatibleAdapter
from slipstream_server.training.base_models import BaseModel, BaseModels


async def test_a_result_is_published_and_the_alias_moved(service: TrainingClient, bench: Bench) -> None:
    await service.create("job", publish="support", alias="live")
    events = await service.events("job")
    assert states(events)[-2:] == ["PUBLISHING", "SUCCEEDED"]
    job = await service.get("job")
    assert job.result.adapter_version == "adapters/support/versions/v1"
    assert (job.result.alias.moved, job.result.alias.generation) == (True, 1)
    (upload,) = bench.registry.uploads
    assert (upload.job, upload.dataset, upload.plan.base_model_name) == ("job", "talk", "models/tiny")
    assert job.result.dataset_digest == f"sha256:{upload.plan.dataset_digest}"
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds.index("result_published") < kinds.index("alias_outcome")


@pytest.mark.parametrize(("registered", "expected"), [("models/tiny", "models/tiny"), ("", "org/tiny")])
async def test_a_base_of_two_names_is_published_under_the_one_its_adapter_has(
    service: TrainingClient, bench: Bench, monkeypatch: pytest.MonkeyPatch, registered: str, expected: str
) -> None:
    resolve = BaseModels.resolve

    def from_a_hub(self: BaseModels, *args: Any, **kwargs: Any) -> BaseModel:
        return dataclasses.replace(resolve(self, *args, **kwargs), name="org/tiny")

    monkeypatch.setattr(BaseModels, "resolve", from_a_hub)
    bench.registry.bases = {"support": registered}
    await service.create("job", publish="support")
    await service.until("job", State.STATE_SUCCEEDED)
    assert [upload.plan.base_model_name for upload in bench.registry.uploads] == [expected]


async def test_a_closed_gate_leaves_version_and_job_as_they_are(service: TrainingClient, bench: Bench) -> None:
    bench.registry.refusal = GateClosed("the gate asks for a lower eval_loss")
    await service.create("job", publish="support", alias="live")
    job = await service.until("job", State.STATE_SUCCEEDED)
    assert job.result.adapter_version == "adapters/support/versions/v1"
    assert not job.result.alias.moved
    assert "lower eval_loss" in job.result.alias.error.message


async def test_publishing_waits_for_a_registry_that_is_away(service: TrainingClient, bench: Bench) -> None:
    bench.registry.failures = [DependencyUnavailable("away"), DependencyUnavailable("away")]
    await service.create("job", publish="support")
    job = await service.until("job", State.STATE_SUCCEEDED)
    assert len(bench.registry.uploads) == 3
    assert len({upload.request_id for upload in bench.registry.uploads}) == 1
    assert job.result.adapter_version == "adapters/support/versions/v1"


async def test_a_refused_adapter_fails_the_job(service: TrainingClient, bench: Bench) -> None:
    bench.registry.failures = [IncompatibleAdapter("another base")]
    await service.create("job", publish="support")
    job = await service.until("job", State.STATE_FAILED)
    assert job.error.message == "another base"


async def test_a_damaged_result_is_not_published(service: TrainingClient, bench: Bench) -> None:
    bench.registry.failures = [DependencyUnavailable("away")]
    await service.create("job", publish="support")
    await service.until("job", State.STATE_PUBLISHING)
    (bench.folder / "jobs" / "job" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    job = await service.until("job", State.STATE_FAILED)
    assert "not what the runner wrote" in job.error.message
