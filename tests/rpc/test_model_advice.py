"""EstimateModelMemory and RecommendModels over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tests.rpc.models_kit import ModelService, edit_config, folder, model_service
from tests.rpc.test_model_making import INVALID, refused

from slipstream.inference.v1 import architecture_pb2
from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.type.v1 import precision_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

GIB = 1024**3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ModelService]:
    async with model_service(tmp_path_factory.mktemp("advice"), budget_bytes=64 * GIB) as running:
        folder(running.root, "base")
        yield running


async def estimate(service: ModelService, source: str, **options: Any) -> pb2.EstimateModelMemoryResponse:
    request = pb2.EstimateModelMemoryRequest(source=source, options=pb2.ModelLoadOptions(**options))
    return await service.stub.EstimateModelMemory(request)


async def recommended(service: ModelService, task: str, **fields: Any) -> Mapping[str, pb2.ModelRecommendation]:
    response = await service.stub.RecommendModels(pb2.RecommendModelsRequest(task=task, page_size=50, **fields))
    return {found.entry.id: found for found in response.recommendations}


async def test_a_catalogue_model_is_estimated_without_a_hub(service: ModelService) -> None:
    """Llama 3.1 8B: 8,030,261,248 parameters, 32 layers of 8 heads of 128 for keys and values, published by Meta."""
    found = await estimate(service, "llama-3-1-8b-instruct")
    assert found.parameter_count == 8_030_261_248
    assert found.weights_bytes == 2 * 8_030_261_248
    assert found.kv_cache_bytes_per_token == 2 * 32 * 8 * 128 * 2
    parts = (found.weights_bytes, found.kv_cache_bytes, found.adapter_bytes, found.overhead_bytes)
    assert found.total_bytes == sum(parts)
    assert found.options.data_type == precision_pb2.DATA_TYPE_BFLOAT16
    assert found.options.quantization == precision_pb2.QUANTIZATION_NONE
    assert found.options.context_tokens == 131_072
    assert found.download_bytes > 16e9
    assert found.fits == (found.total_bytes <= found.available_bytes)


async def test_alternatives_are_smaller_towards_the_end(service: ModelService) -> None:
    found = await estimate(service, "qwen3-8b")
    ways = [(other.data_type, other.quantization) for other in found.alternatives]
    assert ways == [
        (precision_pb2.DATA_TYPE_FLOAT32, precision_pb2.QUANTIZATION_NONE),
        (precision_pb2.DATA_TYPE_BFLOAT16, precision_pb2.QUANTIZATION_INT8),
        (precision_pb2.DATA_TYPE_BFLOAT16, precision_pb2.QUANTIZATION_NF4),
    ]
    sizes = [other.total_bytes for other in found.alternatives]
    assert sizes == sorted(sizes, reverse=True)
    asked = await estimate(service, "qwen3-8b", quantization=precision_pb2.QUANTIZATION_NF4)
    assert asked.total_bytes == sizes[-1]


async def test_a_shorter_context_and_fewer_sequences_take_less(service: ModelService) -> None:
    whole = await estimate(service, "smollm2-135m-instruct")
    less = await estimate(service, "smollm2-135m-instruct", context_tokens=512, max_running_sequences=2)
    assert less.kv_cache_bytes == 2 * 512 * less.kv_cache_bytes_per_token
    assert less.kv_cache_bytes < whole.kv_cache_bytes
    assert less.weights_bytes == whole.weights_bytes


async def test_adapter_slots_count_where_they_are_asked_for(service: ModelService) -> None:
    """A LoRA over one Linear of i inputs and o outputs has rank * (i + o) elements."""
    plain = await estimate(service, "base")
    slots = await estimate(service, "base", adapter_slot_count=2, max_adapter_rank=8)
    layer = 4 * (64 + 64) + 3 * (64 + 128)
    assert plain.adapter_bytes == 0
    assert slots.adapter_bytes == 2 * 8 * 2 * layer * 4
    assert slots.total_bytes - plain.total_bytes == slots.adapter_bytes


async def test_a_device_that_is_not_here_has_nothing_available(service: ModelService) -> None:
    for asked, named in (("cuda:7", "cuda:7"), ("cuda", "cuda:0")):
        found = await estimate(service, "gpt2", device=asked)
        assert (found.device, found.available_bytes, found.fits) == (named, 0, False)
        assert found.total_bytes > found.weights_bytes > 0


async def test_an_encoder_keeps_no_keys_and_values(service: ModelService) -> None:
    found = await estimate(service, "bge-base-en")
    assert (found.kv_cache_bytes, found.kv_cache_bytes_per_token) == (0, 0)
    assert found.weights_bytes == 4 * 109_482_240


async def test_a_folder_of_the_root_is_estimated_from_its_weights(service: ModelService) -> None:
    found = await estimate(service, "base")
    stored = (service.root / "base" / "model.safetensors").stat().st_size
    assert 0 < stored - found.weights_bytes < 10_000
    assert found.download_bytes == 0


@pytest.mark.parametrize(
    ("request_fields", "code", "field"),
    [
        ({"source": ""}, INVALID, "source"),
        ({"source": "no-such-model"}, grpc.StatusCode.NOT_FOUND, ""),
        ({"source": "models/no-such-model"}, grpc.StatusCode.NOT_FOUND, ""),
        ({"source": "../base"}, grpc.StatusCode.NOT_FOUND, ""),
        ({"source": "/etc/passwd"}, grpc.StatusCode.NOT_FOUND, ""),
        ({"source": "file:///etc/passwd"}, grpc.StatusCode.NOT_FOUND, ""),
        ({"source": "http://169.254.169.254/"}, grpc.StatusCode.NOT_FOUND, ""),
        ({"source": "a\0b"}, INVALID, "source"),
        ({"source": "x" * 4096}, INVALID, "source"),
        ({"source": "org/unknown"}, grpc.StatusCode.UNAVAILABLE, ""),
        ({"source": "gpt2", "revision": "main"}, INVALID, "revision"),
        ({"source": "gpt2", "options": {"context_tokens": 0}}, INVALID, "options.context_tokens"),
        ({"source": "gpt2", "options": {"context_tokens": 2**62}}, INVALID, "options.context_tokens"),
        ({"source": "gpt2", "options": {"memory_fraction": float("nan")}}, INVALID, "options.memory_fraction"),
        ({"source": "gpt2", "options": {"device": "tpu"}}, INVALID, "options.device"),
        ({"source": "gpt2", "options": {"max_running_sequences": -1}}, INVALID, "options.max_running_sequences"),
    ],
)
async def test_an_estimate_that_cannot_be_is_refused(
    service: ModelService, request_fields: dict[str, Any], code: grpc.StatusCode, field: str
) -> None:
    found = await refused(service.stub.EstimateModelMemory(pb2.EstimateModelMemoryRequest(**request_fields)))
    assert (found[0], found[2]) == (code, field), found[3]


async def test_a_larger_budget_is_answered_with_larger_models(service: ModelService) -> None:
    small = await recommended(service, "text-generation", memory_bytes=3 * GIB)
    large = await recommended(service, "text-generation", memory_bytes=60 * GIB)
    assert small
    assert all(found.total_bytes <= 3 * GIB for found in small.values())
    assert {*small} < {*large}
    assert "smollm2-135m-instruct" in small
    assert "mistral-7b-instruct-v0-3" in {*large} - {*small}


async def test_the_answer_says_how_to_load_it_and_why(service: ModelService) -> None:
    found = next(iter((await recommended(service, "summarization", memory_bytes=8 * GIB)).values()))
    assert found.entry.id == "bart-cnn"
    assert found.entry.licence == "MIT"
    assert found.entry.family == architecture_pb2.ARCHITECTURE_FAMILY_ENCODER_DECODER
    assert found.options.quantization == precision_pb2.QUANTIZATION_NONE
    assert found.reasons[0] == "best of what fits"
    assert any("ROUGE-1 44.16 (https://" in reason for reason in found.reasons)


async def test_a_recommendation_takes_what_its_estimate_says(service: ModelService) -> None:
    found = (await recommended(service, "text-generation", memory_bytes=60 * GIB))["qwen3-4b"]
    request = pb2.EstimateModelMemoryRequest(source="qwen3-4b", options=found.options)
    assert (await service.stub.EstimateModelMemory(request)).total_bytes == found.total_bytes


async def test_what_fits_only_compressed_says_so(service: ModelService) -> None:
    whole = (await estimate(service, "qwen3-8b", quantization=precision_pb2.QUANTIZATION_INT8)).total_bytes
    found = (await recommended(service, "text-generation", memory_bytes=whole))["qwen3-8b"]
    assert found.options.quantization == precision_pb2.QUANTIZATION_INT8
    assert "fits only compressed to int8" in found.reasons


async def test_only_what_qualifies_is_recommended(service: ModelService) -> None:
    fields: dict[str, Any] = {"memory_bytes": 60 * GIB, "licences": ["apache-2.0"], "languages": ["de", "fr"]}
    found = await recommended(service, "text-generation", min_context_tokens=16_384, **fields)
    assert "qwen3-4b" in found
    for one in found.values():
        assert one.entry.licence == "Apache-2.0"
        assert {"de", "fr"} <= {*one.entry.languages}
        assert one.entry.context_tokens >= 16_384


async def test_nothing_is_an_answer(service: ModelService) -> None:
    assert not await recommended(service, "text-generation", memory_bytes=1)
    assert not await recommended(service, "text-generation", local_only=True)
    assert not await recommended(service, "text-generation", languages=["xx"])


async def test_a_pair_of_languages_is_asked_for_by_the_task(service: ModelService) -> None:
    found = await recommended(service, "translation_en_to_de", memory_bytes=16 * GIB)
    assert all({"en", "de"} <= {*one.entry.languages} for one in found.values())
    assert not await recommended(service, "translation_en_to_ja", memory_bytes=16 * GIB)


@pytest.mark.parametrize("alias", ["sentiment-analysis", "ner", "vqa", "text-to-speech", "rerank"])
async def test_a_task_is_known_by_its_other_names(service: ModelService, alias: str) -> None:
    assert await recommended(service, alias, memory_bytes=16 * GIB)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "task"),
        ({"task": "mind-reading"}, "task"),
        ({"task": "x" * 4096}, "task"),
        ({"task": "fill-mask", "memory_bytes": -1}, "memory_bytes"),
        ({"task": "fill-mask", "min_context_tokens": -1}, "min_context_tokens"),
        ({"task": "fill-mask", "page_size": -1}, "page_size"),
        ({"task": "fill-mask", "page_size": 51}, "page_size"),
        ({"task": "fill-mask", "licences": ["x" * 4096]}, "licences"),
        ({"task": "fill-mask", "languages": ["en"] * 1000}, "languages"),
    ],
)
async def test_a_question_that_cannot_be_is_refused(service: ModelService, fields: dict[str, Any], field: str) -> None:
    found = await refused(service.stub.RecommendModels(pb2.RecommendModelsRequest(**fields)))
    assert (found[0], found[2]) == (INVALID, field), found[3]


async def test_sizes_that_no_answer_can_hold_are_refused(service: ModelService) -> None:
    edit_config(folder(service.root, "boundless"), num_hidden_layers=10**9, hidden_size=10**6)
    found = await refused(estimate(service, "boundless"))
    assert found[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "CORRUPT_ARTIFACT")
