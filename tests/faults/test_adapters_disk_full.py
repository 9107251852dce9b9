"""The adapter service on a disk that fills up: refused with a reason, readable all the while, well again with space."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.rpc.adapters_kit import adapter_service, refused
from tests.unit.adapters.lora_files import WEIGHTS, lora_files
from tests.unit.storage.conftest import small_disk

from slipstream.adapters.v1 import adapter_service_pb2 as pb2

__all__ = ["small_disk"]

pytestmark = pytest.mark.slow
FULL = ("RESOURCE_EXHAUSTED", "STORAGE_FULL")


async def test_a_full_disk_refuses_writes_and_nothing_else(small_disk: Path) -> None:
    async with adapter_service(small_disk) as client:
        await client.upload("support")
        await client.set_alias("support@live", "v1")
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        assert await refused(client.upload("support", lora_files(seed=1))) == FULL
        assert await refused(client.set_alias("support@next", "v1")) == FULL
        version, files = await client.download(name="support")
        assert version.aliases == ["live"]
        assert files[WEIGHTS] == lora_files()[WEIGHTS]
        assert not any(client.store.place.staging.iterdir())
        filler.unlink()
        assert (await client.upload("support", lora_files(seed=1))).name == "adapters/support/versions/v2"
        moved = await client.set_alias("support@live", "v2", expected_generation=1)
        assert moved.alias.generation == 2
        listed = await client.stub.ListAdapterAliases(pb2.ListAdapterAliasesRequest(parent="support"))
        assert [alias.name for alias in listed.adapter_aliases] == ["adapters/support/aliases/live"]
