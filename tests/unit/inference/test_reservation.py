"""What serving reserves: what its models hold, at least its share of a GPU; and what a model is thought to take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.rpc.training_kit import save_tiny_model

from slipstream_server.config import InferenceConfig
from slipstream_server.errors import OutOfMemory
from slipstream_server.inference.footprint import footprint
from slipstream_server.inference.front import ModelPlan
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.devices import device_memory
from slipstream_server.models.facts import read_facts
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.rpc.inference.reservation import NAME, budget_bytes, reserving, wanted_bytes
from slipstream_server.storage.device_ledger import DeviceLedger

MIB = 1024**2
MACHINE = {"cpu": 1000 * MIB, "cuda:0": 100, "cuda:1": 200}


@pytest.fixture
def plan(tmp_path: Path) -> ModelPlan:
    folder = save_tiny_model(tmp_path / "model")
    worker = WorkerConfig(model_folder=folder, load=LoadOptions())
    return ModelPlan(
        name="tiny", folder=folder, facts=read_facts(folder), worker=worker, source="local folder", revision=""
    )


def changed(plan: ModelPlan, **worker: object) -> ModelPlan:
    values = {name: getattr(plan.worker, name) for name in plan.worker.__struct_fields__}
    return dataclasses.replace(plan, worker=WorkerConfig(**{**values, **worker}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("load", "devices"),
    [
        (LoadOptions(), ["cuda:0"]),
        (LoadOptions(device="cuda"), ["cuda:0"]),
        (LoadOptions(device="cuda:1"), ["cuda:1"]),
        (LoadOptions(device="cpu"), ["cpu"]),
        (LoadOptions(device_map="auto"), ["cuda:0", "cuda:1"]),
    ],
)
def test_a_model_takes_memory_where_it_is_put(plan: ModelPlan, load: LoadOptions, devices: list[str]) -> None:
    assert list(footprint(changed(plan, load=load), MACHINE)) == devices


def test_without_a_gpu_models_are_on_the_cpu_and_without_an_engine_nowhere(plan: ModelPlan) -> None:
    assert list(footprint(plan, {"cpu": 1})) == ["cpu"]
    assert footprint(changed(plan, engine="null"), {"cpu": 1}) == {}


def test_keys_and_values_of_the_largest_batch_count(plan: ModelPlan) -> None:
    unbounded = dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, context_tokens=None))
    once, twice = (footprint(changed(unbounded, max_batch_tokens=n), {"cpu": 1})["cpu"] for n in (1000, 2000))
    # By hand: 2 heads of 4, twice, in one layer, 4 bytes each.
    assert twice - once == 1000 * (2 * 4 * 2 * 4)
    # 3 rows of 100 tokens can never fill a batch of 1000.
    short = dataclasses.replace(changed(unbounded, max_batch_tokens=1000, max_batch_size=3), max_context_tokens=100)
    assert once - footprint(short, {"cpu": 1})["cpu"] >= 700 * (2 * 4 * 2 * 4)


def test_of_a_gpu_in_use_at_least_a_share_is_reserved() -> None:
    config = InferenceConfig(memory_fraction=0.5)
    assert wanted_bytes(config, {"cuda:0": 10, "cpu": 7}, MACHINE) == {"cuda:0": 50, "cpu": 7}
    assert wanted_bytes(config, {"cuda:1": 150}, MACHINE) == {"cuda:1": 150}
    assert wanted_bytes(config, {"cuda:1": 0, "cuda:9": 5}, MACHINE) == {"cuda:1": 0}


def test_the_budget_is_a_share_of_each_device_or_what_the_operator_says() -> None:
    assert budget_bytes(InferenceConfig(memory_fraction=0.5), MACHINE)["cuda:1"] == 100
    assert set(budget_bytes(InferenceConfig(memory_budget_bytes=5 * MIB), MACHINE).values()) == {5 * MIB}


def test_what_others_have_reserved_is_refused_with_the_numbers(tmp_path: Path) -> None:
    ledger, capacity = DeviceLedger(tmp_path), device_memory()
    reserve = reserving(ledger, InferenceConfig(), capacity)
    ledger.reserve("training/job", {"cpu": capacity["cpu"]}, capacity)
    with pytest.raises(OutOfMemory) as refused:
        reserve({"cpu": 5 * MIB})
    assert refused.value.metadata["needed_bytes"] == str(5 * MIB)
    ledger.release("training/job")
    reserve({"cpu": 5 * MIB})
    assert ledger.reserved_bytes("cpu") == 5 * MIB
    ledger.release(NAME)
