"""Real models of the catalogue: what a worker holds against what was estimated, what an export answers against the
original, and a made model trained on by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from e2e.services import Running, generate_request, inference_stub, service
from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.inference.v1 import model_service_pb2_grpc as model_grpc
from slipstream.type.v1 import precision_pb2
from slipstream_server.inference.engines import CONTINUOUS
from slipstream_server.inference.footprint import process_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

# What an estimate allows for the worker's imports and scratch.
_PROCESS_BYTES = process_bytes(CONTINUOUS, on_cpu=True)
SMOLLM2, MINILM = "smollm2-135m-instruct", "minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class Served:
    """The service, a stub for its models, and its data directory."""

    running: Running
    models: Any
    channel: grpc.aio.Channel
    data: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    data = tmp_path_factory.mktemp("given-away")
    flags = ("--model", SMOLLM2, "--threads", "1", "--max-batch-tokens", "2048")
    async with (
        service("inference", data, *flags) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield Served(running, model_grpc.ModelServiceStub(channel), channel, data)


async def exported(served: Served, place: Path, **fields: Any) -> Path:
    place.mkdir()
    files: list[Any] = []
    async for response in served.models.ExportModel(pb2.ExportModelRequest(**fields)):
        if response.HasField("header"):
            files = list(response.header.files)
        elif response.HasField("chunk"):
            with (place / files[response.chunk.file_index].path).open("ab") as target:
                target.write(response.chunk.data)
    for file in files:
        assert hashlib.sha256((place / file.path).read_bytes()).hexdigest() == file.sha256
    return place


def last_logits(folder: Path, text: str = "The capital of France is") -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits[0, -1].float()


async def resident_bytes_of_imports() -> int:
    """What a process holds that has imported what a worker does, and loaded nothing."""
    program = (
        "import torch, transformers.models.llama.modeling_llama, psutil; print(psutil.Process().memory_info().rss)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return int(out)


async def test_the_estimate_is_what_the_worker_holds(served: Served) -> None:
    """The resident memory of the worker after it has answered; of the cache, what was used."""
    estimate = await served.models.EstimateModelMemory(pb2.EstimateModelMemoryRequest(source=SMOLLM2))
    await inference_stub(served.channel).Generate(generate_request("The capital of France is", 32))
    model = await served.models.GetModel(pb2.GetModelRequest(name=SMOLLM2))
    assert model.parameter_count == estimate.parameter_count == 134_515_008
    assert estimate.weights_bytes == 4 * 134_515_008
    (worker,) = served.running.workers()
    held = worker.memory_info().rss
    unused = estimate.kv_cache_bytes - 48 * estimate.kv_cache_bytes_per_token
    expected = estimate.total_bytes - unused
    base = await resident_bytes_of_imports()
    print(json.dumps({"model": SMOLLM2, "expected": expected, "held": held, "imports": base}))
    assert 0.9 < expected / held < 1.1
    # What is allowed for the process itself is more than its imports: kernels are compiled in it.
    assert base < _PROCESS_BYTES


async def test_the_estimate_of_an_encoder_is_what_its_weights_take(served: Served) -> None:
    from transformers import AutoModel

    from slipstream_server.models.sources import resolve

    estimate = await served.models.EstimateModelMemory(pb2.EstimateModelMemoryRequest(source=MINILM))
    prepared = await asyncio.to_thread(resolve, MINILM)
    model = AutoModel.from_pretrained(prepared.folder)
    assert abs(estimate.weights_bytes / model.get_memory_footprint() - 1) < 0.01
    assert estimate.kv_cache_bytes == 0


async def test_an_export_answers_as_the_original(served: Served, tmp_path: Path) -> None:
    import torch

    from slipstream_server.models.sources import resolve

    source = (await asyncio.to_thread(resolve, SMOLLM2)).folder
    place = await exported(served, tmp_path / "whole", name=SMOLLM2)
    assert torch.equal(last_logits(place), last_logits(source))
    sharded = await exported(served, tmp_path / "sharded", name=SMOLLM2, max_shard_bytes=200 * 1024**2)
    assert len(list(sharded.glob("*.safetensors"))) >= 2
    assert torch.equal(last_logits(sharded), last_logits(source))
    half = await exported(served, tmp_path / "half", name=SMOLLM2, data_type=precision_pb2.DATA_TYPE_BFLOAT16)
    assert (half / "model.safetensors").stat().st_size < 0.51 * (place / "model.safetensors").stat().st_size
    assert last_logits(half).argmax() == last_logits(source).argmax()


async def test_a_made_model_is_served_and_can_be_trained_on(served: Served) -> None:
    from slipstream_server.training.base_models import BaseModels, require_causal

    request = pb2.CreateModelRequest(model_id="small", config_source=SMOLLM2, seed=1)
    request.config_overrides.update({"num_hidden_layers": 2})
    await served.models.CreateModel(request)
    call = served.models.WatchModels(pb2.WatchModelsRequest(names=["small"]))
    async for event in call:
        assert event.model.state != pb2.Model.STATE_FAILED, event.model.error
        if event.model.state == pb2.Model.STATE_UNLOADED:
            break
    await served.models.LoadModel(pb2.LoadModelRequest(name="small"))
    async for event in call:
        assert event.model.state != pb2.Model.STATE_FAILED, event.model.error
        if event.model.state == pb2.Model.STATE_READY:
            break
    call.cancel()
    asked = generate_request("Hello", 4)
    asked.model = "small"
    answer = await inference_stub(served.channel).Generate(asked)
    assert len(answer.completions[0].token_ids) == 4
    bases = BaseModels({}, (), made=served.data / "inference" / "models")
    base = await asyncio.to_thread(bases.resolve, "models/small")
    require_causal(base)
    assert (base.name, base.facts.num_layers, base.facts.num_parameters) == ("models/small", 2, 35_392_320)


@pytest.mark.parametrize(("quantization", "is_double"), [("int8", False), ("nf4", False), ("nf4", True)])
async def test_compressed_weights_take_what_was_estimated(served: Served, quantization: str, is_double: bool) -> None:
    from slipstream_server.models.load_options import parse_load_options
    from slipstream_server.models.loading import load_model
    from slipstream_server.models.sources import resolve

    source = (await asyncio.to_thread(resolve, SMOLLM2)).folder
    options = parse_load_options({"device": "cpu", "quantization": quantization, "double_quantization": is_double})
    loaded = await asyncio.to_thread(load_model, source, options)
    wanted = pb2.ModelLoadOptions(
        quantization=precision_pb2.Quantization.Value(f"QUANTIZATION_{quantization.upper()}"),
        double_quantization=is_double,
    )
    request = pb2.EstimateModelMemoryRequest(source=SMOLLM2, options=wanted)
    estimate = await served.models.EstimateModelMemory(request)
    print(json.dumps({"as": quantization, "expected": estimate.weights_bytes, "held": loaded.memory_bytes}))
    assert 0.9 < estimate.weights_bytes / loaded.memory_bytes < 1.1
