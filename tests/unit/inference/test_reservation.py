"""What serving reserves: its share of a GPU, or what its models need of the CPU's memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.rpc.training_kit import save_tiny_model

from slipstream_server.config import InferenceConfig
from slipstream_server.inference.front import ModelPlan
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.devices import device_memory
from slipstream_server.models.facts import read_facts
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.rpc.inference.reservation import NAME, reserve, wanted_bytes
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"cuda:0": 50}),
        ({"device": "cuda"}, {"cuda:0": 50}),
        ({"device": "cuda:1"}, {"cuda:1": 100}),
        ({"device_map": "auto"}, {"cuda:0": 50, "cuda:1": 100}),
        ({"device": "mps"}, {}),
        ({"batching": "null"}, {}),
    ],
)
def test_a_share_of_each_gpu_in_use(plan: ModelPlan, changes: dict[str, str], expected: dict[str, int]) -> None:
    config = dataclasses.replace(InferenceConfig(memory_fraction=0.5), **changes)  # type: ignore[arg-type]
    assert wanted_bytes(config, [plan], MACHINE) == expected


def test_the_cpu_by_what_the_models_need(plan: ModelPlan) -> None:
    config = InferenceConfig(device="cpu", max_batch_tokens=1000)
    once, twice = (wanted_bytes(config, [plan] * count, MACHINE)["cpu"] for count in (1, 2))
    assert twice == 2 * once
    # Keys and values by hand: 2 heads of 4, twice, in one layer, 4 bytes each.
    more = wanted_bytes(dataclasses.replace(config, max_batch_tokens=2000), [plan], MACHINE)["cpu"]
    assert more - once == 1000 * (2 * 4 * 2 * 4)


def test_a_machine_with_too_little_serves_all_the_same(
    plan: ModelPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = DeviceLedger(tmp_path)
    ledger.reserve("training/job", {"cpu": device_memory()["cpu"]}, device_memory())
    reserve(ledger, InferenceConfig(device="cpu"), [plan])
    assert "could not reserve" in caplog.text
    ledger.release("training/job")
    reserve(ledger, InferenceConfig(device="cpu"), [plan])
    assert ledger.reserved_bytes("cpu") > 700 * MIB
    ledger.release(NAME)
