"""The registry through the client, against the real service."""

import asyncio
import hashlib
from contextlib import asynccontextmanager

import grpc
import pytest
from tests.rpc.adapters_kit import adapter_service
from tests.unit.adapters.lora_files import BASE, CONFIG, WEIGHTS, lora_files
from tests.unit.client.fake_services import settings_for

from slipstream.adapters.v1 import adapter_service_pb2 as adapter_pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc
from slipstream.type.v1 import artifact_pb2
from slipstream_client import SlipstreamClient, SyncSlipstreamClient
from slipstream_client.errors import (
    AbortedError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
)


@pytest.fixture
async def service(tmp_path):
    async with adapter_service(tmp_path / "service", acknowledge_timeout_s=0.05) as running:
        yield running


@pytest.fixture
async def client(service):
    async with SlipstreamClient(settings=settings_for(f"127.0.0.1:{service.port}")) as connected:
        yield connected


@pytest.fixture
def saved(tmp_path):
    """Make the folder of a saved adapter."""

    def make(seed: int = 0):
        folder = tmp_path / f"adapter-{seed}"
        folder.mkdir()
        for name, data in lora_files(seed).items():
            (folder / name).write_bytes(data)
        (folder / "README.md").write_text("not sent")
        return folder

    return make


async def test_up_and_down_again(client, saved, tmp_path):
    seen = []
    version = await client.adapters.upload("desk", saved(), metrics={"eval_loss": 0.5}, on_progress=seen.append)
    assert (version.name, version.short, version.state) == ("adapters/desk/versions/v1", "desk@v1", "registered")
    assert (version.base_model, version.lora.rank, dict(version.metrics)) == (BASE, 4, {"eval_loss": 0.5})
    assert {file.path for file in version.files} == {CONFIG, WEIGHTS}
    assert seen[-1].fraction == 1
    target = tmp_path / "fetched"
    fetched = await client.adapters.download("desk@v1", target)
    assert fetched.digest == version.digest
    assert {file.name for file in target.iterdir()} == {CONFIG, WEIGHTS}
    hashes = {file.path: file.sha256 for file in version.files}
    for name in (CONFIG, WEIGHTS):
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == hashes[name]


async def test_a_download_sends_only_what_is_missing(client, saved, tmp_path):
    await client.adapters.upload("desk", saved())
    target = tmp_path / "fetched"
    await client.adapters.download("desk@v1", target)
    (target / WEIGHTS).write_bytes(b"broken")
    seen = []
    await client.adapters.download("desk@v1", target, on_progress=seen.append)
    assert seen[-1].total_count == len(lora_files()[WEIGHTS])
    assert (target / WEIGHTS).read_bytes() == lora_files()[WEIGHTS]


async def test_aliases_move_by_compare_and_set_and_roll_back(client, saved):
    for seed in (0, 1):
        await client.adapters.upload("desk", saved(seed))
    aliases = client.adapters.aliases
    move = await aliases.set("desk@live", "v1", expected_generation=0, comment="first")
    assert (move.alias.version, move.alias.generation, move.unconfirmed_replicas) == (
        "adapters/desk/versions/v1",
        1,
        (),
    )
    with pytest.raises(AbortedError):
        await aliases.set("desk@live", "v2", expected_generation=0)
    await aliases.set("desk@live", "v2", expected_generation=1)
    assert (await client.adapters.versions.get("desk")).id == "v2"
    assert (await aliases.roll_back("desk@live")).alias.version.endswith("v1")
    alias = await aliases.get("desk@live")
    assert alias.generation == 3
    assert alias.history[0].version.endswith("v2")
    assert [known.id for known in await aliases.list("desk")] == ["live"]
    with pytest.raises(FailedPreconditionError):
        await client.adapters.versions.delete("desk@v1")
    await aliases.delete("desk@live", expected_generation=3)
    with pytest.raises(NotFoundError):
        await aliases.get("desk@live")


async def test_a_closed_gate_says_so(client, saved):
    await client.adapters.upload("desk", saved(), metrics={"eval_loss": 2.0})
    gate = {"conditions": [{"metric": "eval_loss", "lower_is_better": True, "threshold": 1.0}]}
    with pytest.raises(FailedPreconditionError) as caught:
        await client.adapters.aliases.set("desk@live", "v1", gate=gate)
    assert caught.value.reason == "GATE_CLOSED"
    moved = await client.adapters.aliases.set("desk@live", "v1", gate=gate, override_gate=True)
    assert moved.alias.gate["conditions"][0]["threshold"] == 1.0


async def test_adapters_versions_and_their_ends(client, saved):
    adapter = await client.adapters.create("desk", description="notes tickets", base_model=BASE, labels={"team": "a"})
    assert (adapter.id, adapter.description, adapter.version_count) == ("desk", "notes tickets", 0)
    for seed in (0, 1):
        await client.adapters.upload("desk", saved(seed), create_missing=False)
    assert [version.id for version in await client.adapters.versions.list("desk")] == ["v2", "v1"]
    await client.adapters.versions.delete("desk@v1")
    assert [version.id for version in await client.adapters.versions.list("desk")] == ["v2"]
    assert [v.id for v in await client.adapters.versions.list("desk", states=["retired"])] == ["v1"]
    assert [known.id for known in await client.adapters.list()] == ["desk"]
    assert (await client.adapters.get("desk")).latest_version.endswith("v2")
    with pytest.raises(FailedPreconditionError):
        await client.adapters.delete("desk")
    await client.adapters.delete("desk", force=True)
    with pytest.raises(NotFoundError):
        await client.adapters.upload("desk", saved(2), create_missing=False)


async def test_a_models_default(client, saved):
    await client.adapters.upload("desk", saved())
    change = await client.adapters.set_active("tiny", "desk@v1", expected_generation=0)
    assert (change.active_adapter.adapter, change.active_adapter.enabled) == ("desk@v1", True)
    assert not (await client.adapters.disable("tiny")).active_adapter.enabled
    assert (await client.adapters.enable("tiny")).active_adapter.generation == 3


async def test_a_folder_without_safetensors_is_refused_before_anything_is_sent(client, saved):
    folder = saved()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidRequestError, match=r"has no adapter_model.safetensors; save it with safe_ser"):
        await client.adapters.upload("desk", folder)
    assert await client.adapters.list() == []


class Liar(adapter_service_pb2_grpc.AdapterServiceServicer):
    """Sends one file as a test tells it to."""

    path, sent, announced = "weights", b"good", b"good"

    async def GetAdapterVersion(self, request, context):
        file = artifact_pb2.ArtifactFile(
            path=self.path, size_bytes=len(self.announced), sha256=hashlib.sha256(self.announced).hexdigest()
        )
        return adapter_pb2.AdapterVersion(name="adapters/desk/versions/v1", files=[file])

    async def DownloadAdapter(self, request, context):
        version = await self.GetAdapterVersion(request, context)
        yield adapter_pb2.DownloadAdapterResponse(header=adapter_pb2.DownloadAdapterHeader(version=version))
        chunk = artifact_pb2.ArtifactChunk(data=self.sent)
        yield adapter_pb2.DownloadAdapterResponse(chunk=chunk)


@asynccontextmanager
async def client_of(liar):
    server = grpc.aio.server()
    adapter_service_pb2_grpc.add_AdapterServiceServicer_to_server(liar, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with SlipstreamClient(settings=settings_for(f"127.0.0.1:{port}")) as client:
            yield client
    finally:
        await server.stop(grace=0)


@pytest.mark.parametrize("path", ["../weights", "/etc/weights", "a/../../weights", "..", "a\\b", "./weights", ""])
async def test_a_download_stays_in_its_folder(tmp_path, path):
    liar = Liar()
    liar.path = path
    async with client_of(liar) as client:
        with pytest.raises(ProtocolError, match="not below the folder"):
            await client.adapters.download("desk@v1", tmp_path / "inner")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("sent", [b"evil", b"goo", b"goods"])
async def test_other_bytes_than_announced_leave_nothing(tmp_path, sent):
    liar = Liar()
    liar.sent = sent
    async with client_of(liar) as client:
        with pytest.raises(ProtocolError, match="weights"):
            await client.adapters.download("desk@v1", tmp_path / "inner")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_without_an_event_loop(saved, tmp_path):
    loop_client: list[SyncSlipstreamClient] = []

    async def serve():
        async with adapter_service(tmp_path / "service", acknowledge_timeout_s=0.05) as service:
            return await asyncio.to_thread(use, service.port)

    def use(port):
        with SyncSlipstreamClient(settings=settings_for(f"127.0.0.1:{port}")) as client:
            loop_client.append(client)
            client.adapters.upload("desk", saved())
            client.adapters.aliases.set("desk@live", "v1")
            assert client.adapters.versions.get("desk@live").id == "v1"
            assert client.adapters.download("desk", tmp_path / "fetched").id == "v1"

    asyncio.run(serve())
    assert loop_client
