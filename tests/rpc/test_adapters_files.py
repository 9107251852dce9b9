"""AdapterService over gRPC: what comes in by upload and goes out by download, and what is refused at the door."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load, save
from tests.rpc.adapters_kit import (
    AdapterClient,
    adapter_service,
    chunk_messages,
    config_of,
    failure,
    header_message,
    refused,
)
from tests.unit.adapters.lora_files import CONFIG, WEIGHTS, lora_files, lora_tensors, peft_config, sha256

from slipstream.adapters.v1 import adapter_service_pb2 as pb2
from slipstream.type.v1 import artifact_pb2

Files = dict[str, bytes]
UNSAFE = ("FAILED_PRECONDITION", "UNSAFE_WEIGHTS")
CORRUPT = ("FAILED_PRECONDITION", "CORRUPT_ARTIFACT")
INCOMPATIBLE = ("FAILED_PRECONDITION", "INCOMPATIBLE_ADAPTER")
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[AdapterClient]:
    async with adapter_service(tmp_path) as client:
        yield client


async def left_behind(client: AdapterClient) -> tuple[int, int]:
    """Adapters in the registry, and files anywhere in the store but its lock."""
    adapters = (await client.stub.ListAdapters(pb2.ListAdaptersRequest())).adapters
    root = client.store.place.staging.parent
    return len(adapters), len([file for file in root.rglob("*") if file.is_file() and file.name != "lock"])


async def test_what_was_uploaded_comes_down_again(client: AdapterClient) -> None:
    uploaded = await client.upload("support", chunk_bytes=333)
    version, files = await client.download(name="support@v1")
    assert version == uploaded
    assert files[WEIGHTS] == lora_files()[WEIGHTS]
    assert {file.path: (file.size_bytes, file.sha256) for file in version.files} == {
        path: (len(data), sha256(data)) for path, data in files.items()
    }
    assert load(files[WEIGHTS]).keys() == lora_tensors().keys()
    config = config_of(files)
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 4, ["down_proj", "q_proj"])
    _, weights_only = await client.download(digest=version.digest, skipped_paths=[CONFIG])
    assert list(weights_only) == [WEIGHTS]


async def test_peft_reads_the_stored_configuration(client: AdapterClient, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    await client.upload("support", lora_files(config=peft_config(rank_pattern={"q_proj": 4}, use_rslora=True)))
    _, files = await client.download(name="support@v1")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / CONFIG).write_bytes(files[CONFIG])
    config = LoraConfig.from_pretrained(str(tmp_path / "peft"))
    assert (config.r, config.lora_alpha, config.use_rslora, config.rank_pattern) == (4, 8, True, {"q_proj": 4})
    assert config.target_modules == {"q_proj", "down_proj"}


async def test_bytes_that_rotted_in_the_store_are_not_passed_off_as_good(client: AdapterClient) -> None:
    version = await client.upload("support")
    weights = next(file for file in version.files if file.path == WEIGHTS)
    blob = client.store.place.staging.parent / "blobs" / "sha256" / weights.sha256[:2] / weights.sha256
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    code, reason, message, _ = await failure(client.download(name="support@v1"))
    assert (code.name, reason) == CORRUPT
    assert str(blob.parent) not in message


def with_weights(data: bytes) -> Files:
    return {CONFIG: lora_files()[CONFIG], WEIGHTS: data}


def with_config(**changes: Any) -> Files:
    return lora_files(config=peft_config(**changes))


def header_only(header: Mapping[str, Any], data: bytes = b"") -> Files:
    raw = json.dumps(header).encode()
    return with_weights(struct.pack("<Q", len(raw)) + raw + data)


def replaced(name: str, change: Callable[[Any], Any], by: str = "") -> Files:
    """The adapter with one tensor changed, under its own name or another one."""
    tensors = lora_tensors()
    tensors[by or name] = change(tensors[name])
    return with_weights(save(tensors))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN, UP = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
HUGE = {"dtype": "F32", "shape": [10**6, 10**6, 10**6], "data_offsets": [0, 4 * 10**18]}

BAD_ADAPTERS: dict[str, tuple[Files, tuple[str, str]]] = {
    "pickled weights": ({CONFIG: b"{}", "adapter_model.bin": b"x"}, UNSAFE),
    "an optimizer": ({**lora_files(), "optimizer.pt": b"x"}, UNSAFE),
    "a stranger's file": ({**lora_files(), "README.md": b"x"}, INVALID),
    "a file outside": ({**lora_files(), "../adapter_model.safetensors": b"x"}, INVALID),
    "an absolute file": ({CONFIG: b"{}", "/etc/passwd": b"x"}, INVALID),
    "a file with NUL": ({CONFIG: b"{}", "a\0b": b"x"}, INVALID),
    "no weights": ({CONFIG: lora_files()[CONFIG]}, INVALID),
    "empty weights": ({CONFIG: lora_files()[CONFIG], WEIGHTS: b""}, INVALID),
    "remote code": (with_config(auto_map={"AutoModel": "evil.Model"}), UNSAFE),
    "a module to import": (with_config(megatron_config={"x": 1}, megatron_core="os"), UNSAFE),
    "an unknown key": (with_config(surprise=1), CORRUPT),
    "another method": (with_config(peft_type="IA3"), INCOMPATIBLE),
    "replicated layers": (with_config(layer_replication=[[0, 2], [0, 2]]), INCOMPATIBLE),
    "an initialisation that changes the base": (with_config(init_lora_weights="pissa"), INCOMPATIBLE),
    "a configuration that is a list": ({**lora_files(), CONFIG: b"[]"}, CORRUPT),
    "a configuration with NaN": ({**lora_files(), CONFIG: b'{"peft_type": "LORA", "r": NaN}'}, CORRUPT),
    "a configuration with duplicate keys": ({**lora_files(), CONFIG: b'{"r": 4, "r": 8}'}, CORRUPT),
    "a configuration nested too deep": ({**lora_files(), CONFIG: b"[" * 100_000}, CORRUPT),
    "a rank that is no count": (with_config(r="4"), CORRUPT),
    "a rank over the largest": (with_config(r=4096), CORRUPT),
    "a pattern for ranks": (with_config(rank_pattern={"(a+)+$": 4}), CORRUPT),
    "a rank other than the tensors'": (with_config(r=8), CORRUPT),
    "targets other than the tensors'": (with_config(target_modules=["v_proj"]), CORRUPT),
    "truncated weights": (with_weights(lora_files()[WEIGHTS][:-100]), CORRUPT),
    "weights cut in the header": (with_weights(lora_files()[WEIGHTS][:50]), CORRUPT),
    "weights of four bytes": (with_weights(b"abcd"), CORRUPT),
    "a header of 100 MB": (with_weights(struct.pack("<Q", 100 * 2**20) + b"{" * 100), CORRUPT),
    "shapes beyond all bounds": (header_only({DOWN: HUGE}), CORRUPT),
    "no tensors": (header_only({}), CORRUPT),
    "a tensor that is no LoRA's": (replaced(DOWN, lambda down: down, by="base_model.model.x.weight"), INCOMPATIBLE),
    "half a pair": (with_weights(save({DOWN: lora_tensors()[DOWN]})), CORRUPT),
    "factors that do not meet": (replaced(UP, lambda up: up[:, :3].copy()), CORRUPT),
    "a base without a name": (with_config(base_model_name_or_path="/home/me/model"), INVALID),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
async def test_bad_adapters_are_refused_and_leave_nothing(client: AdapterClient, case: str) -> None:
    files, expected = BAD_ADAPTERS[case]
    code, reason, message, _ = await failure(client.upload("support", files))
    assert (code.name, reason) == expected, message
    assert await left_behind(client) == (0, 0)
    assert str(client.store.place.staging.parent) not in message
    assert "Traceback" not in message


async def test_a_path_in_the_configuration_is_replaced_by_what_the_uploader_says(client: AdapterClient) -> None:
    files = with_config(base_model_name_or_path="/home/me/model", revision=None)
    version = await client.upload("support", files, base_model="models/tiny", base_model_revision="r1")
    assert (version.base_model, version.base_model_revision) == ("models/tiny", "r1")
    stored = config_of((await client.download(name="support@v1"))[1])
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("models/tiny", "r1")
    with_path = client.upload("other", files, base_model="../model")
    assert await refused(with_path) == INVALID


async def test_another_base_than_the_adapters_is_refused(client: AdapterClient) -> None:
    await client.stub.CreateAdapter(
        pb2.CreateAdapterRequest(adapter_id="support", adapter=pb2.Adapter(base_model="org/big"))
    )
    assert await refused(client.upload("support")) == INCOMPATIBLE
    said = header_message("support", lora_files(), base_model="org/tiny", validate_only=True)
    assert await refused(client.stub.UploadAdapter(iter([said]))) == INCOMPATIBLE
    assert await left_behind(client) == (1, 0)


async def test_an_upload_to_an_adapter_that_is_not_there_needs_create_missing(client: AdapterClient) -> None:
    assert await refused(client.upload("support", create_missing=False)) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    checked = await client.stub.UploadAdapter(
        iter([header_message("support", lora_files(), create_missing=True, validate_only=True)])
    )
    assert (checked.name, len(checked.files)) == ("", 2)
    assert await left_behind(client) == (0, 0)


async def test_a_repeated_upload_is_answered_at_its_header(client: AdapterClient) -> None:
    first = await client.upload("support", request_id="r1")
    again = iter([header_message("support", lora_files(), create_missing=True, request_id="r1")])
    assert await client.stub.UploadAdapter(again) == first
    assert await refused(client.upload("other", request_id="r1")) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    listed = await client.stub.ListAdapterVersions(pb2.ListAdapterVersionsRequest(parent="support"))
    assert len(listed.adapter_versions) == 1


async def test_an_upload_that_failed_does_not_use_up_its_request_id(client: AdapterClient) -> None:
    only_header = iter([header_message("support", lora_files(), create_missing=True, request_id="r1")])
    assert await refused(client.stub.UploadAdapter(only_header)) == CORRUPT
    assert (await client.upload("support", request_id="r1")).name == "adapters/support/versions/v1"


async def test_chunks_must_come_in_order_and_be_what_was_announced(client: AdapterClient) -> None:
    files = lora_files()
    header = header_message("support", files, create_missing=True)
    chunks = list(chunk_messages(files))
    empty = pb2.UploadAdapterRequest(chunk=artifact_pb2.ArtifactChunk(data=b""))
    flipped = {**files, WEIGHTS: files[WEIGHTS][:-1] + bytes([files[WEIGHTS][-1] ^ 1])}
    longer = {CONFIG: files[CONFIG] + b" ", WEIGHTS: files[WEIGHTS]}
    cases: list[tuple[list[pb2.UploadAdapterRequest], tuple[str, str]]] = [
        ([], INVALID),
        (chunks, INVALID),
        ([header, *reversed(chunks)], INVALID),
        ([header, chunks[0], *chunks[2:]], INVALID),
        ([header, chunks[0], *chunks], INVALID),
        ([header, header, *chunks], INVALID),
        ([header, empty, *chunks], INVALID),
        ([header, *chunks, chunks[-1]], INVALID),
        ([header, pb2.UploadAdapterRequest(), *chunks], INVALID),
        ([header, *chunks[:-1]], CORRUPT),
        ([header, *chunk_messages(flipped)], CORRUPT),
        ([header, *chunk_messages(longer, chunk_bytes=100_000)], CORRUPT),
    ]
    for number, (messages, expected) in enumerate(cases):
        assert await refused(client.stub.UploadAdapter(iter(messages))) == expected, number
    assert await left_behind(client) == (0, 0)


async def test_a_claim_of_too_much_is_refused_before_a_byte_is_read(client: AdapterClient) -> None:
    for size, expected in ((10**10, "RESOURCE_EXHAUSTED"), (2**63 - 1, "RESOURCE_EXHAUSTED"), (-1, "INVALID_ARGUMENT")):
        announced = [
            artifact_pb2.ArtifactFile(path=CONFIG, size_bytes=10, sha256="0" * 64),
            artifact_pb2.ArtifactFile(path=WEIGHTS, size_bytes=size, sha256="0" * 64),
        ]
        header = header_message("support", {}, announced=announced, create_missing=True)
        assert (await refused(client.stub.UploadAdapter(iter([header]))))[0] == expected


async def test_an_abandoned_upload_leaves_nothing(client: AdapterClient, assert_eventually: Any) -> None:
    files = lora_files()

    async def half() -> AsyncIterator[pb2.UploadAdapterRequest]:
        yield header_message("support", files, create_missing=True)
        chunks = list(chunk_messages(files))
        for chunk in chunks[: len(chunks) // 2]:
            yield chunk
        await asyncio.Event().wait()

    call = client.stub.UploadAdapter(half())
    staging = client.store.place.staging
    await assert_eventually(lambda: any(staging.iterdir()))
    call.cancel()
    await assert_eventually(lambda: not any(staging.iterdir()))
    assert await left_behind(client) == (0, 0)


async def test_eight_uploads_at_once_get_eight_numbers(client: AdapterClient) -> None:
    versions = await asyncio.gather(*(client.upload("support", lora_files(seed)) for seed in range(8)))
    assert sorted(version.name for version in versions) == [f"adapters/support/versions/v{n}" for n in range(1, 9)]
    same = await asyncio.gather(*(client.upload("other", lora_files()) for _ in range(8)))
    assert {version.name for version in same} == {"adapters/other/versions/v1"}
