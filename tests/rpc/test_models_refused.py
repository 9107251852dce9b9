"""What LoadModel refuses: names, places, configurations and options, each by its field."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from tests.rpc.models_kit import (
    MODEL,
    edit_config,
    error_info,
    folder,
    generate,
    model_service,
)

from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.type.v1 import precision_pb2

GPTQ = precision_pb2.QUANTIZATION_GPTQ


@pytest.mark.parametrize(
    ("name", "source", "code", "reason"),
    [
        ("../x", "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("", "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("a\0b", "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x" * 4096, "", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "../outside", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "a/../../outside", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "..%2foutside", "NOT_FOUND", "MODEL_NOT_FOUND"),
        ("x", "~/outside", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "a\0b", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "ｔｉｎｙ", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "file:///etc", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "http://169.254.169.254/", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "y" * 4096, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("x", "/etc", "PERMISSION_DENIED", "PERMISSION_DENIED"),
        ("x", "OUTSIDE", "PERMISSION_DENIED", "PERMISSION_DENIED"),
        ("x", "link", "NOT_FOUND", "MODEL_NOT_FOUND"),
        ("x", "nothing", "NOT_FOUND", "MODEL_NOT_FOUND"),
        ("x", "pickled", "FAILED_PRECONDITION", "UNSAFE_WEIGHTS"),
        ("x", "empty", "FAILED_PRECONDITION", "CORRUPT_ARTIFACT"),
    ],
)
async def test_bad_names_and_places_are_refused_at_once(
    tmp_path: Path, name: str, source: str, code: str, reason: str
) -> None:
    async with model_service(tmp_path) as service:
        outside = folder(tmp_path, "outside")
        (service.root / "link").symlink_to(outside)
        (service.root / "empty").mkdir()
        pickled = folder(service.root, "pickled")
        (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load(name, source=str(outside) if source == "OUTSIDE" else source)
        assert error_info(refused.value) == (code, reason)
        assert str(tmp_path) not in refused.value.details()
        assert await service.states() == {}


async def test_a_configuration_that_wants_code_of_its_own_ends_in_failure(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        made = folder(service.root, "coded")
        edit_config(made, model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"})
        (made / "code.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')")
        await service.load("coded")
        failed = await service.reached("coded", MODEL.STATE_FAILED)
        assert failed.error.details[0].value.find(b"UNSAFE_WEIGHTS") > 0
        assert not (tmp_path / "opened").exists()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(service, "coded")
        assert error_info(refused.value) == ("FAILED_PRECONDITION", "UNSAFE_WEIGHTS")


@pytest.mark.parametrize(
    ("options", "code", "reason", "field"),
    [
        ({"context_tokens": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.context_tokens"),
        ({"context_tokens": 2**62}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.context_tokens"),
        ({"context_tokens": 32_769}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.context_tokens"),
        ({"max_running_sequences": -1}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.max_running_sequences"),
        ({"memory_fraction": float("nan")}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.memory_fraction"),
        ({"memory_fraction": 1.5}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.memory_fraction"),
        ({"device": "mars"}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.device"),
        ({"device": "cuda:7"}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.device"),
        ({"attention_implementation": "a/b"}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.attention_implementation"),
        ({"data_type": 77}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.data_type"),
        ({"data_type": precision_pb2.DATA_TYPE_FLOAT64}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.data_type"),
        ({"quantization": GPTQ}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.quantization"),
        ({"double_quantization": True}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.double_quantization"),
        ({"tensor_parallel_count": 2}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.tensor_parallel_count"),
        ({"prefix_caching": True}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.prefix_caching"),
        ({"batch_invariant": True}, "INVALID_ARGUMENT", "UNSUPPORTED_FIELD", "options.batch_invariant"),
        ({"adapter_slot_count": 257}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.adapter_slot_count"),
        ({"max_adapter_rank": 0}, "INVALID_ARGUMENT", "INVALID_FIELD", "options.max_adapter_rank"),
    ],
)  # fmt: skip
async def test_an_option_is_honoured_or_refused_by_its_name(
    tmp_path: Path, options: dict[str, object], code: str, reason: str, field: str
) -> None:
    async with model_service(tmp_path) as service:
        folder(service.root, "tiny")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("tiny", options=pb2.ModelLoadOptions(**options))
        assert error_info(refused.value) == (code, reason)
        assert field in refused.value.details()
        assert await service.states() == {}
