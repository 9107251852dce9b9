"""Exports of stored files: what is given away, how many at once, and what is refused before anything runs."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio
from tests.conftest import Eventually
from tests.e2e.tiny_model import write_tiny_model

from slipstream_server.errors import (
    CorruptArtifact,
    InvalidField,
    OutOfMemory,
    QueueFull,
    StorageFull,
    UnsupportedField,
)
from slipstream_server.inference import exports as room
from slipstream_server.inference.exports import ExportRequest, Exports, chunks_of
from slipstream_server.models.facts import read_facts
from slipstream_server.models.tool_process import ToolProgress, ignore_tool_progress


@pytest_asyncio.fixture
async def request_(tmp_path: Path) -> AsyncIterator[ExportRequest]:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_model(folder)
    (folder / "slipstream.json").write_text("{}")
    (folder / "README.md").write_text("not the model's")
    yield ExportRequest(model="tiny", folder=folder, facts=read_facts(folder))


async def test_stored_files_leave_as_they_are(request_: ExportRequest, tmp_path: Path) -> None:
    seen: list[ToolProgress] = []
    async with Exports(tmp_path / "exports").open(request_, seen.append) as files:
        names = {file.name for file in files}
        for file in files:
            content = b"".join([block async for _, block in chunks_of(file)])
            assert content == (request_.folder / file.name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file.sha256
    assert names == {path.name for path in request_.folder.iterdir()} - {"slipstream.json", "README.md"}
    assert not (tmp_path / "exports").exists()
    await asyncio.sleep(0)
    assert seen[-1].done == seen[-1].total


async def test_a_file_that_changes_while_it_is_sent_ends_the_stream(request_: ExportRequest, tmp_path: Path) -> None:
    async with Exports(tmp_path / "exports").open(request_, ignore_tool_progress) as files:
        config = next(file for file in files if file.name == "config.json")
        config.path.write_text("{}")
        with pytest.raises(CorruptArtifact):
            async for _ in chunks_of(config):
                pass


async def test_few_run_at_once_few_more_wait_and_the_rest_is_refused(
    request_: ExportRequest, tmp_path: Path, assert_eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_MAX_WAITING", 1)
    exports, seen = Exports(tmp_path / "exports"), list[ToolProgress]()
    async with AsyncExitStack() as held:
        for _ in range(2):
            await held.enter_async_context(exports.open(request_, ignore_tool_progress))
        waiting = exports.open(request_, seen.append)
        entering = asyncio.create_task(waiting.__aenter__())
        await assert_eventually(lambda: seen)
        assert seen[0].stage == "waiting"
        with pytest.raises(QueueFull) as refused:
            async with exports.open(request_, ignore_tool_progress):
                pass
        assert refused.value.retry_after_s
        assert not entering.done()
    assert await entering
    await waiting.__aexit__(None, None, None)


@pytest.mark.parametrize("size", [0, -1, 1024**2 - 1, 2**63 - 1])
async def test_a_shard_that_cannot_be_is_refused(request_: ExportRequest, size: int) -> None:
    with pytest.raises(InvalidField, match="max_shard_bytes"):
        replace(request_, max_shard_bytes=size).check()


async def test_quantized_weights_are_not_cast(request_: ExportRequest) -> None:
    quantized = replace(request_, facts=replace(request_.facts, quantization_method="gptq"))
    quantized.check()
    with pytest.raises(UnsupportedField, match="data_type"):
        replace(quantized, data_type="float32").check()


async def test_no_room_is_told_before_anything_is_written(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports, cast = Exports(tmp_path / "exports"), replace(request_, data_type="bfloat16")
    with monkeypatch.context() as patched:
        patched.setattr(room.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        with pytest.raises(OutOfMemory) as short:
            async with exports.open(cast, ignore_tool_progress):
                pass
        assert short.value.metadata["left_bytes"] == "1000"
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageFull):
        async with exports.open(cast, ignore_tool_progress):
            pass
    assert not (tmp_path / "exports").exists()


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "export-left").mkdir()
    (tmp_path / "somebody-elses").mkdir()
    Exports(tmp_path).tidy()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-elses"]
