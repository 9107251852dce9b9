"""Models that clients loaded, in a service of its own process: loaded again after it was killed, and after SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import grpc
from tests.e2e.services import service
from tests.e2e.tiny_model import write_tiny_model

from slipstream.inference.v1 import model_service_pb2 as pb2
from slipstream.inference.v1 import model_service_pb2_grpc as model_grpc

READY = pb2.Model.STATE_READY
FLAGS = ("--batching", "null", "--model-roots")


async def ready(stub: Any, name: str) -> pb2.Model:
    call = stub.WatchModels(pb2.WatchModelsRequest(names=[name]), timeout=60)
    async for event in call:
        if event.WhichOneof("event") == "model" and event.model.state == READY:
            call.cancel()
            return event.model
    raise AssertionError("the watch ended")


async def test_a_killed_and_a_stopped_service_load_what_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "root" / "tiny").mkdir(parents=True)
    write_tiny_model(tmp_path / "root" / "tiny")
    flags = (*FLAGS, str(tmp_path / "root"))
    async with service("inference", tmp_path / "data", *flags) as running:
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = model_grpc.ModelServiceStub(channel)
            assert not (await stub.ListModels(pb2.ListModelsRequest())).models
            options = pb2.ModelLoadOptions(context_tokens=77)
            await stub.LoadModel(pb2.LoadModelRequest(name="tiny", options=options))
            first = await ready(stub, "tiny")
        running.kill()
        await running.process.wait()
    for _ in range(2):
        async with service("inference", tmp_path / "data", *flags) as running:
            async with grpc.aio.insecure_channel(running.address) as channel:
                again = await ready(model_grpc.ModelServiceStub(channel), "tiny")
            assert (again.context_tokens, again.etag, again.create_time) == (77, first.etag, first.create_time)
            running.kill(signal.SIGTERM)
            assert await running.process.wait() == 0
