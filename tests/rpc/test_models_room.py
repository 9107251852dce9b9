"""ModelService where memory is short: who gives way to whom, who stays, and who is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from tests.rpc.models_kit import (
    MODEL,
    error_info,
    error_metadata,
    folder,
    generate,
    held_open,
    model_service,
    retry_after_s,
)

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.type.v1 import generation_pb2

BUSY_RETRY_S = 5.0


async def test_the_least_recently_used_idle_model_gives_way(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        for name in ("first", "second", "third"):
            folder(service.root, name)
        await service.loaded("first")
        await service.loaded("second")
        await generate(service, "first")
        await service.loaded("third")
        assert await service.states() == {"first": "READY", "second": "UNLOADED", "third": "READY"}
        assert (await service.get("second")).state_message == "unloaded to make room for third"


async def test_pinned_and_busy_models_stay_and_the_refusal_has_the_numbers(tmp_path: Path) -> None:
    async with model_service(tmp_path) as service:
        for name in ("pinned", "busy", "third"):
            folder(service.root, name)
        await service.loaded("pinned", pinned=True)
        await service.loaded("busy")
        stream = await held_open(service, "busy")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("third")
        assert error_info(refused.value) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
        assert error_metadata(refused.value) | {"needed_bytes": "40", "left_bytes": "20", "budget_bytes": "100"} == (
            error_metadata(refused.value)
        )
        assert retry_after_s(refused.value) == BUSY_RETRY_S
        assert "third" not in await service.states()
        stream.close()
        await service.loaded("third")
        assert await service.states() == {"busy": "UNLOADED", "pinned": "READY", "third": "READY"}


async def test_two_loads_at_once_do_not_both_take_the_last_room(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes={"pinned": 50}) as service:
        for name in ("pinned", "left", "right"):
            folder(service.root, name)
        await service.loaded("pinned", pinned=True)
        results = await asyncio.gather(
            *(service.load(name, pinned=True) for name in ("left", "right")), return_exceptions=True
        )
        ended = [
            await service.reached(name, MODEL.STATE_READY, MODEL.STATE_FAILED)
            for name, result in zip(("left", "right"), results, strict=True)
            if not isinstance(result, BaseException)
        ]
        ready = [model for model in ended if model.state == MODEL.STATE_READY]
        assert len(ready) == 1
        assert service.loads.room.budget.held_bytes("cpu") == 90
        for model in ended:
            if model.state == MODEL.STATE_FAILED:
                assert "left" in model.error.message


async def test_a_model_larger_than_all_there_is_is_refused_and_never_asked_again(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes={"huge": 101}) as service:
        folder(service.root, "huge")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.load("huge")
        assert error_info(refused.value) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
        assert (retry_after_s(refused.value) or 0) < BUSY_RETRY_S
        assert await service.states() == {}


async def test_streams_on_one_model_do_not_notice_that_two_others_load(tmp_path: Path) -> None:
    async with model_service(tmp_path, sizes=dict.fromkeys(("first", "second", "third"), 10)) as service:
        for name in ("first", "second", "third"):
            folder(service.root, name)
        await service.loaded("first")
        stopping = generation_pb2.StoppingOptions(max_new_tokens=20)
        request = inference_pb2.GenerateRequest(model="first", text="hello", stopping=stopping)
        is_loading = True

        async def stream() -> int:
            num_answers = 0
            while is_loading or not num_answers:
                events = [event async for event in service.inference.StreamGenerate(request)]
                assert events[-1].finished.usage.completion_tokens == 20
                num_answers += 1
            return num_answers

        streaming = [asyncio.create_task(stream()) for _ in range(16)]
        await asyncio.gather(service.loaded("second"), service.loaded("third"))
        is_loading = False
        assert min(await asyncio.gather(*streaming)) >= 1
        assert set((await service.states()).values()) == {"READY"}
