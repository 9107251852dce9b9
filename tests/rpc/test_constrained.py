"""Constraints over a real server and worker: answers match, and what is refused names its field."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest

from e2e.tiny_model import write_tiny_model
from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.type.v1 import usage_pb2
from slipstream_server.config import ListenConfig
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount, open_server

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
async def stub(tmp_path: Path, assert_eventually: Callable[..., Awaitable[None]]) -> AsyncIterator[Any]:
    folder = write_tiny_model(tmp_path / "tiny")
    front = InferenceFront(FrontConfig())
    await front.start()
    try:
        worker = WorkerConfig(model_folder=folder, threads=1)
        front.add_model(ModelPlan(name="tiny", folder=folder, facts=read_facts(folder), worker=worker))
        await assert_eventually(lambda: front.status("tiny").state in ("ready", "failed"), timeout_s=90)
        mount = Mount(
            inference_grpc.add_InferenceServiceServicer_to_server,
            InferenceServicer(front),  # type: ignore[abstract]
        )
        async with (
            open_server([mount], ListenConfig()) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            yield inference_grpc.InferenceServiceStub(channel)
    finally:
        await front.close()


def asking(**constraint: Any) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(text="hello", constraint=constraint)
    request.sampling.do_sample = True
    request.sampling.seed = 4
    request.stopping.max_new_tokens = 400
    return request


@pytest.mark.slow
async def test_answers_match_and_refusals_name_the_field(stub: Any) -> None:
    (answer,) = (await stub.Generate(asking(json_schema=json.dumps(SCHEMA)))).completions
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert answer.finish_reason == usage_pb2.FINISH_REASON_EOS_TOKEN
    (answer,) = (await stub.Generate(asking(regex="[a-f]{4,8}!"))).completions
    assert re.fullmatch("[a-f]{4,8}!", answer.text)
    request = asking(choice={"choices": ["red", "green"]})
    request.stopping.ignore_eos = True
    (answer,) = (await stub.Generate(request)).completions
    assert answer.text in {"red", "green"}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Generate(asking(regex=r"(a)\1"))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "constraint.regex" in (refused.value.details() or "")
    request = asking(regex="a")
    request.ClearField("sampling")
    request.num_beams = 2
    with pytest.raises(grpc.aio.AioRpcError, match="beam search"):
        await stub.Generate(request)
