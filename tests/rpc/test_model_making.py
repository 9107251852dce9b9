"""CreateModel and ExportModel over gRPC: tiny models, made and given away by real subprocesses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import struct_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.numpy import load_file
from tests.conftest import Eventually
from tests.rpc.models_kit import MODEL, ModelService, folder, model_service

from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.type.v1 import precision_pb2
from slipstream_server.errors import AdapterNotFound
from slipstream_server.inference.generation import AdapterPin

pytestmark = pytest.mark.asyncio(loop_scope="module")

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip


class Adapters:
    """Stands in for the registry: the adapter ``support`` is the folder that a test puts there."""

    def __init__(self) -> None:
        self.folder = ""

    async def __call__(self, model: str, adapter: str) -> AdapterPin:
        if adapter != "support":
            raise AdapterNotFound(f"no adapter {adapter!r}")
        return AdapterPin(version="adapters/support/versions/v1", digest="0" * 64, folder=self.folder)


ADAPTERS = Adapters()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ModelService]:
    data = tmp_path_factory.mktemp("making")
    async with model_service(data, resolve_adapter=ADAPTERS) as running:
        folder(running.root, "base")
        yield running


def struct(values: dict[str, Any]) -> struct_pb2.Struct:
    message = struct_pb2.Struct()
    message.update(values)
    return message


def creation(model_id: str, overrides: dict[str, Any] | None = None, **fields: Any) -> pb2.CreateModelRequest:
    if "config" not in fields:
        fields.setdefault("config_source", "base")
    return pb2.CreateModelRequest(model_id=model_id, config_overrides=struct(overrides or {}), **fields)


async def made(service: ModelService, request: pb2.CreateModelRequest) -> pb2.Model:
    model = await service.stub.CreateModel(request)
    assert model.state == MODEL.STATE_CREATING
    call = service.stub.WatchModels(pb2.WatchModelsRequest(names=[request.model_id]), timeout=60)
    async for event in call:
        # What its files tell is read a moment after they are there.
        model = event.model
        if model.state == MODEL.STATE_FAILED or (model.state == MODEL.STATE_UNLOADED and model.architecture):
            call.cancel()
            return model
    raise AssertionError("the watch ended")


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str, str]:
    """Code, reason, first field and message of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    status = rpc_status.from_call(failure.value)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return failure.value.code(), info.reason, field, status.message


async def exported(service: ModelService, place: Path, **fields: Any) -> pb2.ExportHeader:
    """Receive an export as any client would: by its header, chunk by chunk."""
    header, stages, data = None, [], {}
    async for response in service.stub.ExportModel(pb2.ExportModelRequest(**fields)):
        match response.WhichOneof("event"):
            case "progress":
                assert header is None
                stages.append(response.progress.stage)
            case "header":
                assert header is None
                header = response.header
            case "chunk":
                assert header is not None
                received = data.setdefault(response.chunk.file_index, bytearray())
                assert response.chunk.offset_bytes == len(received)
                received += response.chunk.data
    assert header is not None
    assert stages
    place.mkdir()
    for index, file in enumerate(header.files):
        content = bytes(data.get(index, b""))
        assert len(content) == file.size_bytes
        assert hashlib.sha256(content).hexdigest() == file.sha256
        (place / file.path).write_bytes(content)
    return header


def logits(place: Path, **arguments: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(place)("hello there", return_tensors="pt").input_ids
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(place, **arguments).eval()(ids).logits


async def test_a_model_is_made_from_another_ones_configuration_with_overrides(service: ModelService) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    overrides = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = await made(service, creation("small", overrides, seed=11))
    assert (model.state, model.architecture, model.base_model) == (MODEL.STATE_UNLOADED, "LlamaForCausalLM", "base")
    place = service.loads.model_records.get("small").known_folder
    assert place is not None
    config = AutoConfig.from_pretrained(place)
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (1, 8, 8)
    torch.manual_seed(11)
    expected = AutoModelForCausalLM.from_config(config).state_dict()
    stored = load_file(place / "model.safetensors")
    assert all(torch.equal(torch.from_numpy(stored[key]), expected[key]) for key in stored)
    assert model.parameter_count == sum(value.size for value in stored.values())
    assert (place / "tokenizer.json").read_bytes() == (service.root / "base" / "tokenizer.json").read_bytes()


@pytest.mark.slow
async def test_a_made_model_can_be_loaded_and_deleted(service: ModelService) -> None:
    await made(service, creation("passing"))
    place = service.loads.model_records.get("passing").known_folder
    assert (await service.loaded("passing")).state == MODEL.STATE_READY
    await service.unload("passing")
    await service.reached("passing", MODEL.STATE_UNLOADED)
    await service.stub.DeleteModel(pb2.DeleteModelRequest(name="passing"))
    assert place is not None
    assert not place.exists()


@pytest.mark.slow
async def test_a_model_is_made_from_a_whole_configuration(service: ModelService) -> None:
    fields = {"config": struct(TINY), "tokenizer_source": "base", "data_type": precision_pb2.DATA_TYPE_BFLOAT16}
    model = await made(service, creation("inline", **fields))
    assert model.state == MODEL.STATE_UNLOADED, model.error
    place = service.loads.model_records.get("inline").known_folder
    assert place is not None
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"


async def test_the_auto_class_chooses_the_head(service: ModelService) -> None:
    request = creation("labels", {"num_labels": 3}, auto_class="AutoModelForSequenceClassification")
    request.validate_only = True
    checked = await service.stub.CreateModel(request)
    assert checked.architecture == "LlamaForSequenceClassification"
    assert checked.parameter_count > 0
    assert "labels" not in await service.states()


async def test_a_model_that_reads_no_text_needs_no_tokenizer(service: ModelService) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    picture = struct({"model_type": "vit", "image_size": 16, "patch_size": 8, "num_labels": 3, **shape})
    fields = {"config": picture, "auto_class": "AutoModelForImageClassification", "validate_only": True}
    checked = await service.stub.CreateModel(creation("pictures", **fields))
    # Patches 8*8*3*32+32, class and 4+1 places, one layer, its two norms and the last one, three labels.
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32 + 4 * 32
    assert checked.parameter_count == 8 * 8 * 3 * 32 + 32 + 32 + 5 * 32 + layer + 64 + 3 * 32 + 3


@pytest.mark.slow
async def test_a_family_that_nobody_counted_is_built_to_be_counted(service: ModelService) -> None:
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    fields = {"config": struct({"model_type": "mamba", **shape}), "auto_class": "AutoModelForCausalLM"}
    request = creation("state-space", tokenizer_source="base", validate_only=True, **fields)
    checked = await service.stub.CreateModel(request)
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(**shape))
    assert checked.parameter_count == sum(weight.numel() for weight in model.parameters())


@pytest.mark.slow
async def test_a_repeat_answers_as_the_first_did(service: ModelService) -> None:
    request = creation("once", {"num_hidden_layers": 1}, request_id="again")
    first = await service.stub.CreateModel(request)
    second = await service.stub.CreateModel(request)
    assert first.name == second.name == "models/once"
    assert first.create_time == second.create_time
    other = creation("twice", {"num_hidden_layers": 1}, request_id="again")
    assert (await refused(service.stub.CreateModel(other)))[1] == "REQUEST_ID_REUSED"
    assert (await refused(service.stub.CreateModel(creation("once"))))[1] == "ALREADY_EXISTS"
    await service.reached("once", MODEL.STATE_UNLOADED)


INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("overrides", "fields", "field"),
    [
        ({"num_hiden_layers": 2}, {}, "config_overrides.num_hiden_layers"),
        ({"rms_norm_eps": float("nan")}, {}, "config_overrides.rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, {}, "config_overrides.rms_norm_eps"),
        ({"vocab_size": 10}, {}, "config_overrides.vocab_size"),
        ({"vocab_size": 2.0**30, "hidden_size": 2.0**20, "intermediate_size": 2.0**20}, {}, "config_overrides"),
        ({}, {"auto_class": "AutoModelForEverything"}, "auto_class"),
        ({}, {"seed": -1}, "seed"),
        ({}, {"data_type": 99}, "data_type"),
        ({}, {"config_source": ""}, "configuration"),
        ({}, {"config": struct(TINY)}, "tokenizer_source"),
        ({}, {"config": struct({**TINY, "colour": "red"}), "tokenizer_source": "base"}, "config.colour"),
        ({}, {"request_id": "x" * 65}, "request_id"),
        ({}, {"config_source": "/etc"}, "config_source"),
        ({}, {"config_source": "a\0b"}, "config_source"),
    ],
)  # fmt: skip
async def test_a_configuration_that_cannot_be_is_refused_by_its_field(
    service: ModelService, overrides: dict[str, Any], fields: dict[str, Any], field: str
) -> None:
    code, _, named, message = await refused(service.stub.CreateModel(creation("never", overrides, **fields)))
    if named:
        assert (code, named) == (INVALID, field), message
    else:
        assert code == grpc.StatusCode.NOT_FOUND, message
        assert message.startswith(field)
    assert str(service.root.parent) not in message
    assert "never" not in await service.states()


@pytest.mark.parametrize("name", ["", "../x", "/etc/passwd", "a\0b", "..%2f", "x" * 4096, "mоdel", "A"])
async def test_a_name_that_is_none_is_refused(service: ModelService, name: str) -> None:
    code, _, field, _ = await refused(service.stub.CreateModel(creation(name)))
    assert (code, field) == (INVALID, "model_id")


async def test_remote_code_is_refused_before_anything_runs(service: ModelService) -> None:
    for place in ({"auto_map": {"AutoConfig": "x.Y"}}, {"rope_parameters": {"auto_map": "x"}}):
        code, reason, _, message = await refused(service.stub.CreateModel(creation("never", place)))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UNSAFE_WEIGHTS"), message
    inline = creation("never", config=struct({**TINY, "auto_map": {"AutoConfig": "x.Y"}}), tokenizer_source="base")
    assert (await refused(service.stub.CreateModel(inline)))[1] == "UNSAFE_WEIGHTS"


async def test_what_memory_cannot_hold_is_refused_with_the_numbers(service: ModelService) -> None:
    wide = {"hidden_size": 2**17, "intermediate_size": 2**18, "num_attention_heads": 64, "num_key_value_heads": 64}
    code, reason, _, message = await refused(service.stub.CreateModel(creation("never", wide)))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"), message
    assert "parameters" in message


async def test_an_export_is_the_stored_files_and_loads_with_plain_transformers(
    service: ModelService, tmp_path: Path
) -> None:
    import torch

    await service.load("base")
    await service.reached("base")
    place = tmp_path / "export"
    header = await exported(service, place, name="base")
    assert header.model == "models/base"
    names = [file.path for file in header.files]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {*names}
    source = service.root / "base"
    assert all((place / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert torch.equal(logits(place), logits(source))


@pytest.mark.slow
async def test_an_export_is_cast_and_cut_into_shards(service: ModelService, tmp_path: Path) -> None:
    import torch

    large = {"vocab_size": 8192, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    await made(service, creation("large", large, seed=1))
    place = tmp_path / "export"
    shard = 2 * 1024**2
    header = await exported(
        service, place, name="large", data_type=precision_pb2.DATA_TYPE_BFLOAT16, max_shard_bytes=shard
    )
    weights = [file for file in header.files if file.path.endswith(".safetensors")]
    assert len(weights) >= 2
    assert "model.safetensors.index.json" in {file.path for file in header.files}
    source = service.loads.model_records.get("large").known_folder
    assert source is not None
    assert torch.equal(logits(place), logits(source, dtype=torch.bfloat16))
    assert not list((service.root.parent / "exports").iterdir())


@pytest.mark.slow
async def test_a_merged_export_answers_as_the_adapter_does(service: ModelService, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    source = service.root / "base"
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(tmp_path / "adapter")
    ADAPTERS.folder = str(tmp_path / "adapter")
    await service.load("base")
    await service.reached("base")
    place = tmp_path / "export"
    header = await exported(service, place, name="base", adapter="support")
    assert header.adapter_version == "adapters/support/versions/v1"
    ids = torch.tensor([[5, 17, 300, 42]])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter").eval()
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(place).eval()(ids).logits
        assert torch.allclose(merged, adapted(ids).logits, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(source).eval()(ids).logits
    assert not torch.allclose(merged, plain, atol=1e-2)
    assert not list((service.root.parent / "exports").iterdir())


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"name": "nothing"}, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ({"name": ""}, INVALID, "INVALID_FIELD"),
        ({"name": "../x"}, INVALID, "INVALID_FIELD"),
        ({"name": "base", "max_shard_bytes": 0}, INVALID, "INVALID_FIELD"),
        ({"name": "base", "max_shard_bytes": -1}, INVALID, "INVALID_FIELD"),
        ({"name": "base", "max_shard_bytes": 2**62}, INVALID, "INVALID_FIELD"),
        ({"name": "base", "data_type": 99}, INVALID, "INVALID_FIELD"),
        ({"name": "base", "adapter": "unknown"}, grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
    ],
)
async def test_an_export_that_cannot_be_is_refused(
    service: ModelService, fields: dict[str, Any], code: grpc.StatusCode, reason: str
) -> None:
    await service.load("base")
    await service.reached("base")
    call = service.stub.ExportModel(pb2.ExportModelRequest(**fields))
    found = await refused(anext(aiter(call)))
    assert found[:2] == (code, reason), found[3]


async def test_a_client_that_leaves_ends_the_work_and_its_files(
    service: ModelService, assert_eventually: Eventually
) -> None:
    await service.load("base")
    await service.reached("base")
    exports = service.root.parent / "exports"
    request = pb2.ExportModelRequest(name="base", data_type=precision_pb2.DATA_TYPE_FLOAT64)
    call = service.stub.ExportModel(request)
    first = await anext(aiter(call))
    assert first.progress.stage == "loading weights"
    assert list(exports.iterdir())
    call.cancel()
    await assert_eventually(lambda: not list(exports.iterdir()))


async def test_a_service_that_ended_while_it_made_a_model_says_so(tmp_path: Path) -> None:
    async with model_service(tmp_path) as first:
        folder(first.root, "base")
        await first.stub.CreateModel(creation("half"))
        assert (await first.states())["half"] == "CREATING"
    async with model_service(tmp_path) as second:
        model = await second.reached("half", MODEL.STATE_FAILED)
        assert "make it again" in model.error.message
        await second.stub.DeleteModel(pb2.DeleteModelRequest(name="half"))
        assert "half" not in await second.states()
    assert not list((tmp_path / "own").glob(".making-*"))
