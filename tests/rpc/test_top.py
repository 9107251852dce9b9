"""The metrics of a served model as requests pass, and ``slipstream top`` as a process of its own beside them."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from e2e.tiny_model import write_tiny_model
from slipstream.inference.v1 import inference_service_pb2 as pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.type.v1 import generation_pb2
from slipstream_client.cli.metrics_port import MetricsUnavailable, Samples, read_metrics, total
from slipstream_client.settings import ClientSettings
from slipstream_server.config import ListenConfig
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount, RpcServer, open_server
from unit.inference.conftest import OpenFront, open_front, tokenizer_folder  # noqa: F401 - fixtures
from unit.inference.fake_worker import ANSWER, ENDLESS

Eventually = Callable[..., Awaitable[None]]
TOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A running service, its stub, and what its metrics port says."""

    server: RpcServer
    stub: Any

    def call(self, *ids: int, tokens: int) -> Any:
        stopping = generation_pb2.StoppingOptions(max_new_tokens=tokens, ignore_eos=True)
        return self.stub.Generate(pb2.GenerateRequest(token_ids=pb2.TokenIds(ids=ids), stopping=stopping))

    async def scrape(self, token: str = "") -> Samples:
        settings = ClientSettings.resolve(token=token, environ={})
        return await asyncio.to_thread(read_metrics, f"127.0.0.1:{self.server.metrics_port}", settings, timeout_s=10)

    async def top(self, *flags: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "slipstream_client.cli", "top", "--address", f"127.0.0.1:{self.server.port}",
            "--metrics-address", f"127.0.0.1:{self.server.metrics_port}", "--interval", "0.3", *flags,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={"PATH": "", "COLUMNS": "80"},
        )  # fmt: skip


@asynccontextmanager
async def served(front: InferenceFront, registry: CollectorRegistry, **listen: Any) -> AsyncIterator[Served]:
    mount = Mount(inference_grpc.add_InferenceServiceServicer_to_server, InferenceServicer(front))  # type: ignore[abstract]
    async with (
        open_server([mount], ListenConfig(**listen), registry=registry) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield Served(server, inference_grpc.InferenceServiceStub(channel))


@pytest.fixture
async def service(open_front: OpenFront, assert_eventually: Eventually) -> AsyncIterator[Served]:  # noqa: F811
    async with open_front() as fake:
        await assert_eventually(lambda: fake.state == "ready")
        async with served(fake.front, fake.registry) as running:
            yield running


async def test_one_look_tells_what_runs_and_how_fast(service: Served, assert_eventually: Eventually) -> None:
    await service.call(ANSWER, 20, 21, tokens=4)
    endless = asyncio.ensure_future(service.call(ENDLESS, 20, tokens=4000))
    top = await service.top("--once", "--json")
    out, err = await asyncio.wait_for(top.communicate(), TOP_S)
    endless.cancel()
    assert top.returncode == 0, err
    (line,) = out.splitlines()
    frame = json.loads(line)
    assert frame["problem"] == ""
    assert {each["service"]: each["state"] for each in frame["services"]}["inference"] == "serving"
    (model,) = frame["models"]
    figures: Mapping[str, Any] = model["figures"]
    assert (figures["model"], figures["num_running"], figures["num_waiting"]) == ("fake", 1, 0)
    assert (figures["num_succeeded"], figures["num_failed"], figures["max_batch_size"]) == (1, 0, 4)
    assert figures["generation_tokens_per_s"] > 0
    assert 0 < figures["first_token"]["p50_s"] <= figures["first_token"]["p99_s"] < 60


async def test_it_goes_on_until_it_is_interrupted(service: Served) -> None:
    top = await service.top("--json")
    assert top.stdout is not None
    async with asyncio.timeout(TOP_S):
        frames = [json.loads(await top.stdout.readline()) for _ in range(3)]
        top.send_signal(signal.SIGINT)
        _, err = await top.communicate()
    assert top.returncode == 0
    assert err == b""
    assert frames[0]["time"] < frames[1]["time"] < frames[2]["time"]
    assert len(frames[2]["models"][0]["figures"]["generation_history"]) == 3


async def test_the_picture_in_a_pipe(service: Served) -> None:
    top = await service.top("--once")
    out, _ = await asyncio.wait_for(top.communicate(), TOP_S)
    text = out.decode()
    assert top.returncode == 0
    assert "0 of 4 rows" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


async def test_a_port_that_asks_for_a_token_gets_it(open_front: OpenFront, tmp_path: Path) -> None:  # noqa: F811
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token-of-enough-length-0123456789\n")
    tokens.chmod(0o600)
    async with open_front() as fake, served(fake.front, fake.registry, token_file=tokens) as running:
        with pytest.raises(MetricsUnavailable, match="401"):
            await running.scrape()
        assert total(await running.scrape("a-token-of-enough-length-0123456789"), "slipstream_max_batch_size") == 4


@pytest.mark.slow
async def test_the_metrics_of_a_real_model_move_as_its_requests_do(
    tmp_path: Path, assert_eventually: Eventually
) -> None:
    folder, registry = write_tiny_model(tmp_path / "tiny"), CollectorRegistry()
    front = InferenceFront(FrontConfig(), registry=registry)
    await front.start()
    try:
        worker = WorkerConfig(model_folder=folder, threads=1, max_batch_size=4)
        front.add_model(ModelPlan(name="tiny", folder=folder, facts=read_facts(folder), worker=worker))
        await assert_eventually(lambda: front.status("tiny").state == "ready", timeout_s=90)
        async with served(front, registry) as running:
            await asyncio.gather(*(running.call(*range(10, 15), tokens=7) for _ in range(6)))
            samples: Samples = ()

            def value(name: str) -> float | None:
                return total(samples, f"slipstream_{name}", model="tiny")

            async with asyncio.timeout(10):
                while not value("engine_steps_total"):  # the worker tells of itself four times a second
                    samples = await running.scrape()
            assert value("prompt_tokens_total") == 6 * 5
            assert value("generation_tokens_total") == 6 * 7
            assert total(samples, "slipstream_request_success_total", finish_reason="length") == 6
            assert value("time_to_first_token_seconds_count") == 6
            assert value("inter_token_latency_seconds_count") == 6 * (7 - 1)
            assert value("e2e_request_latency_seconds_count") == value("request_queue_time_seconds_count") == 6
            assert (value("num_requests_running"), value("num_requests_waiting")) == (0, 0)
            # At most 4 rows a step, and no fewer than one.
            steps, rows = value("engine_steps_total"), value("engine_batch_rows_total")
            assert steps is not None and rows is not None  # noqa: PT018
            assert 1 <= rows / steps <= 4
            labels = {"gen_ai_request_model": "tiny", "gen_ai_operation_name": "text_completion"}
            for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
                assert total(samples, f"gen_ai_server_{name}_seconds_count", **labels) == 6
    finally:
        await front.close()
