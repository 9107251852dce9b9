"""RunTask, StreamTask, ListTasks and DescribeTask over a real server; the worker plays a script."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from prometheus_client import CollectorRegistry

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.inference.v1 import tasks_pb2
from slipstream_server.config import ListenConfig
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.inference.worker_process import WorkerLaunch
from slipstream_server.models.facts import facts_of_config
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount, open_server
from unit.inference import fake_task_worker
from unit.inference.conftest import QUICK
from unit.inference.fake_task_worker import FAIL_ALL, POISON, POISON_ONCE, SILENT, WRONG

Eventually = Callable[..., Awaitable[None]]
FACTS = facts_of_config(
    {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "vocab_size": 100,
     "max_position_embeddings": 512, "id2label": {"0": "contradiction", "1": "entailment"}}
)  # fmt: skip


@dataclass
class Service:
    stub: Any
    front: InferenceFront
    log: Path
    port: int
    registry: CollectorRegistry

    def lines(self) -> list[str]:
        return [line.split(" ", 1)[1] for line in self.log.read_text().splitlines()]


@pytest.fixture
async def service(tmp_path: Path, assert_eventually: Eventually) -> AsyncIterator[Service]:
    log = tmp_path / "commands"
    script = str(Path(fake_task_worker.__file__))
    registry = CollectorRegistry()
    front = InferenceFront(FrontConfig(restart=QUICK, admission=AdmissionLimits(max_requests=64)), registry=registry)
    await front.start()
    plan = ModelPlan(
        name="judge",
        folder=tmp_path,
        facts=FACTS,
        worker=WorkerConfig(model_folder=tmp_path, engine="tasks", tasks=("text-classification",), max_batch_size=4),
        launch=WorkerLaunch(command=lambda socket: [sys.executable, script, str(socket), str(log)]),
    )
    try:
        front.add_model(plan)
        await assert_eventually(lambda: front.status("judge").state == "ready")
        mount = Mount(inference_grpc.add_InferenceServiceServicer_to_server, InferenceServicer(front))
        async with (
            open_server([mount], ListenConfig()) as server,
            grpc.aio.insecure_channel(
                f"127.0.0.1:{server.port}", options=[("grpc.max_send_message_length", 64 << 20)]
            ) as channel,
        ):
            yield Service(inference_grpc.InferenceServiceStub(channel), front, log, server.port, registry)
    finally:
        await front.close()


def run_request(*texts: str, task: str = "text-classification", **parameters: Any) -> tasks_pb2.RunTaskRequest:
    request = tasks_pb2.RunTaskRequest(task=task, inputs=[tasks_pb2.TaskInput(text=text) for text in texts])
    request.parameters.update(parameters)
    return request


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    return str(info_of(status).reason)


def info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value), caught.value.details() or ""


async def test_results_keep_the_order_of_the_inputs(service: Service) -> None:
    texts = ["a" * (place % 37 + 1) for place in range(1000)]
    answer = await service.stub.RunTask(run_request(*texts, task="sentiment-analysis"))
    assert [result.classification.labels[0].label_id for result in answer.results] == [len(text) for text in texts]
    assert (answer.model, answer.usage.prompt_tokens) == ("models/judge", sum(map(len, texts)))


async def test_one_input_fails_alone(service: Service) -> None:
    answer = await service.stub.RunTask(run_request("fine", WRONG, "with\0nul"))
    outcomes = [result.WhichOneof("outcome") for result in answer.results]
    assert outcomes == ["classification", "error", "error"]
    errors = [result.error for result in answer.results[1:]]
    assert [error.code for error in errors] == [code_pb2.INVALID_ARGUMENT] * 2
    assert [info_of(error).reason for error in errors] == ["PROMPT_TOO_LONG", "INVALID_FIELD"]
    assert info_of(errors[0]).domain == "slipstream"
    assert "NUL" in errors[1].message


async def test_what_a_worker_cannot_do_for_a_request_is_an_error_of_its_inputs(service: Service) -> None:
    answer = await service.stub.RunTask(run_request(FAIL_ALL, "other"))
    assert {result.error.code for result in answer.results} == {code_pb2.RESOURCE_EXHAUSTED}


async def test_bad_requests_are_refused_by_name(service: Service) -> None:
    run = service.stub.RunTask
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    code, reason, text = await refused(run(run_request("a", task="text-clasification")))
    assert (code, reason) == (invalid, "INVALID_FIELD")
    assert "'text-classification'" in text
    assert (await refused(run(run_request("a", task=""))))[0] is invalid
    assert "1 to 1024" in (await refused(run(run_request())))[2]
    assert "1 to 1024" in (await refused(run(run_request(*["a"] * 1025))))[2]
    code, reason, text = await refused(run(run_request("a", topk=3)))
    assert (code, reason) == (invalid, "UNKNOWN_PARAMETER")
    assert "'top_k'" in text
    assert (await refused(run(run_request("a", top_k=0))))[1] == "INVALID_FIELD"
    assert (await refused(run(run_request("a", top_k=1.5))))[1] == "INVALID_FIELD"
    assert (await refused(run(run_request("a", device="cuda:0"))))[1] == "UNSUPPORTED_FIELD"
    assert (await run(run_request("a", batch_size=8))).results[0].WhichOneof("outcome") == "classification"
    request = run_request("a")
    request.inputs[0].image.data = b"png"
    assert "kind image" in (await refused(run(request)))[2]
    request = run_request("a")
    request.inputs.add()
    assert "inputs[1]" in (await refused(run(request)))[2]
    request = run_request("a")
    request.adapter = "support"
    assert (await refused(run(request)))[1] == "UNSUPPORTED_FIELD"
    request = run_request("a")
    request.model = "nobody"
    assert (await refused(run(request)))[:2] == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    request = run_request("a", task="summarization")
    assert (await refused(run(request)))[:2] == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    request.model = "judge"
    assert (await refused(run(request)))[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")


async def test_ten_thousand_labels_and_a_megabyte(service: Service) -> None:
    request = tasks_pb2.RunTaskRequest(task="zero-shot-classification")
    request.inputs.add().zero_shot.text = "a"
    request.inputs[0].zero_shot.candidate_labels.extend(f"label {place}" for place in range(10_000))
    request.inputs.add(text="no").zero_shot.text = "b" * (1024 * 1024 + 1)
    request.inputs[1].zero_shot.candidate_labels.append("one")
    answer = await service.stub.RunTask(request)
    assert "1 to 256" in answer.results[0].error.message
    assert "at most 1048576" in answer.results[1].error.message


async def test_over_large_messages_are_refused(service: Service) -> None:
    request = run_request(*["b" * (1024 * 1024)] * 17)
    code, reason, _ = await refused(service.stub.RunTask(request))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


async def test_a_worker_that_dies_costs_one_retry(service: Service) -> None:
    answer = await service.stub.RunTask(run_request("a", POISON_ONCE))
    assert [result.classification.labels[0].label_id for result in answer.results] == [1, len(POISON_ONCE)]
    assert service.lines().count("started") == 2


async def test_a_poisoned_call_fails_after_two_deaths(service: Service) -> None:
    code, reason, _ = await refused(service.stub.RunTask(run_request("a", POISON)))
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_DIED")


async def test_a_call_that_no_worker_can_answer_in_time_is_refused_before_its_deadline(
    service: Service, assert_eventually: Eventually
) -> None:
    """What waits for the next worker may wait as long as that one takes to load, and no longer for nothing."""
    service.log.with_suffix(".held").touch()
    supervisor = service.front._models["judge"].supervisor
    supervisor._load_s = 60.0  # what the first one took; the next one takes longer still
    status = service.front.status("judge")
    assert status.worker_pid is not None
    waiting = asyncio.ensure_future(service.stub.RunTask(run_request(SILENT)))
    await assert_eventually(lambda: any(line.startswith("submit") for line in service.lines()))
    began_s = time.monotonic()
    held_up = asyncio.ensure_future(service.stub.RunTask(run_request(SILENT), timeout=30))
    await assert_eventually(lambda: len(service.front._task_runs) == 2)
    os.kill(status.worker_pid, signal.SIGKILL)
    assert (await refused(held_up))[:2] == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
    later = await refused(service.stub.RunTask(run_request("new"), timeout=30))
    assert later[:2] == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
    assert time.monotonic() - began_s < 15
    assert not waiting.done()  # it has all the time there is
    waiting.cancel()


async def test_a_deadline_frees_the_worker(service: Service, assert_eventually: Eventually) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.RunTask(run_request(SILENT), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_eventually(lambda: any(line.startswith("cancel") for line in service.lines()))
    assert service.front._models["judge"].dispatcher.num_in_flight == 0
    assert not service.front._task_runs


async def test_a_call_that_is_cancelled_frees_the_worker(service: Service, assert_eventually: Eventually) -> None:
    call = service.stub.RunTask(run_request(SILENT))
    await assert_eventually(lambda: any(line.startswith("submit") for line in service.lines()))
    call.cancel()
    await assert_eventually(lambda: any(line.startswith("cancel") for line in service.lines()))
    assert not service.front._task_runs


def header(task: str = "text-classification", **fields: Any) -> tasks_pb2.StreamTaskRequest:
    return tasks_pb2.StreamTaskRequest(header=tasks_pb2.StreamTaskHeader(task=task, **fields))


def inputs(*texts: str) -> tasks_pb2.StreamTaskRequest:
    return tasks_pb2.StreamTaskRequest(inputs=[tasks_pb2.TaskInput(text=text) for text in texts])


async def streamed(service: Service, *requests: tasks_pb2.StreamTaskRequest) -> list[tasks_pb2.StreamTaskResponse]:
    return [response async for response in service.stub.StreamTask(iter(requests))]


async def test_a_stream_answers_every_input_once(service: Service) -> None:
    requests = [header(), inputs(), *(inputs(*["a" * (n % 9 + 1)] * (n % 5)) for n in range(600))]
    texts = [item.text for request in requests for item in request.inputs]
    responses = await streamed(service, *requests)
    by_index = {response.index: response.result.classification.labels[0].label_id for response in responses}
    assert len(responses) == len(texts)
    assert [by_index[place] for place in range(len(texts))] == [len(text) for text in texts]
    assert responses[0].model == "models/judge"
    assert not any(response.model for response in responses[1:])


async def test_a_stream_needs_one_header_in_its_first_message(service: Service) -> None:
    for requests in ([inputs("a")], [], [header(), inputs("a"), header()], [header(max_pending_inputs=0)]):
        code, reason, _ = await refused(streamed(service, *requests))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert not service.front._task_runs


async def test_a_stream_reads_no_further_ahead_than_told(service: Service, assert_eventually: Eventually) -> None:
    sent = []

    async def requests() -> AsyncIterator[tasks_pb2.StreamTaskRequest]:
        yield header(max_pending_inputs=3)
        for text in (SILENT, "a", SILENT, "b", SILENT, *["c"] * 5000):
            sent.append(text)
            yield inputs(text)

    call = service.stub.StreamTask(requests())
    answered = [await call.read(), await call.read()]
    assert sorted(response.index for response in answered) == [1, 3]
    (run,) = service.front._task_runs
    await assert_eventually(lambda: run.num_added == 5)
    await asyncio.wait_for(run.wait_for_room(4), 5)
    assert (run.num_added, run.num_pending) == (5, 3)
    call.cancel()
    await assert_eventually(lambda: not service.front._task_runs)
    assert service.front._models["judge"].dispatcher.num_in_flight == 0


async def test_a_stream_waits_where_the_queue_is_full(service: Service) -> None:
    """The queue holds 64 requests; a stream of single inputs that may have 4,096 under way fills it."""
    responses = await streamed(service, header(max_pending_inputs=4096), *(inputs("a") for _ in range(2000)))
    assert len(responses) == 2000
    assert all(response.result.WhichOneof("outcome") == "classification" for response in responses)


async def test_a_stream_whose_model_is_unloaded_between_its_inputs_ends(service: Service) -> None:
    is_unloaded = asyncio.Event()

    async def requests() -> AsyncIterator[tasks_pb2.StreamTaskRequest]:
        yield header()
        yield inputs("a")
        await is_unloaded.wait()
        yield inputs("b")

    call = service.stub.StreamTask(requests())
    assert (await call.read()).index == 0
    await service.front.remove_model("judge")
    is_unloaded.set()
    code, _, message = await refused(asyncio.wait_for(call.read(), 10))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "judge was unloaded" in message
    assert not service.front._task_runs


async def test_a_stream_goes_on_after_an_input_that_kills_workers(service: Service) -> None:
    requests = [header(max_pending_inputs=1), inputs("a"), inputs(POISON), inputs("b")]
    outcomes = {response.index: response.result for response in await streamed(service, *requests)}
    assert [outcomes[place].WhichOneof("outcome") for place in range(3)] == [
        "classification",
        "error",
        "classification",
    ]
    assert info_of(outcomes[1].error).reason == "WORKER_DIED"


async def test_tasks_are_listed_and_described(service: Service) -> None:
    listed: list[tasks_pb2.Task] = []
    token = ""
    while True:
        page = await service.stub.ListTasks(tasks_pb2.ListTasksRequest(page_size=7, page_token=token))
        listed += page.tasks
        if not (token := page.next_page_token):
            break
    names = [task.name for task in listed]
    assert names == sorted(names)
    assert {"tasks/text-classification", "tasks/summarization", "tasks/object-detection"} <= set(names)
    able = await service.stub.ListTasks(tasks_pb2.ListTasksRequest(model="models/judge"))
    wanted = ["text-classification", "text-ranking", "zero-shot-classification"]
    assert [task.name.removeprefix("tasks/") for task in able.tasks] == wanted
    task = await service.stub.DescribeTask(tasks_pb2.DescribeTaskRequest(name="tasks/ner"))
    assert (task.name, task.default_model) == ("tasks/token-classification", "")
    task = await service.stub.DescribeTask(tasks_pb2.DescribeTaskRequest(name="sentiment-analysis"))
    assert task.default_model == "models/judge"
    top_k = next(parameter for parameter in task.parameters if parameter.name == "top_k")
    assert (top_k.default_value.number_value, top_k.min_value) == (1, 1)
    assert "LoadModel" in next(p.description for p in task.parameters if p.name == "load_in_8bit")
    for name, code in (("nothing", grpc.StatusCode.NOT_FOUND), ("", grpc.StatusCode.INVALID_ARGUMENT)):
        assert (await refused(service.stub.DescribeTask(tasks_pb2.DescribeTaskRequest(name=name))))[0] is code
    for page_size in (-1, 101):
        bad = await refused(service.stub.ListTasks(tasks_pb2.ListTasksRequest(page_size=page_size)))
        assert bad[1] == "INVALID_FIELD"
        assert f"{page_size} is not from 0 (the default of 50) to 100" in bad[2]


async def test_latencies_and_outcomes_are_measured_by_task(service: Service) -> None:
    def value(name: str, **labels: str) -> float:
        task = {"model": "judge", "task": "text-classification", **labels}
        return service.registry.get_sample_value(f"slipstream_{name}", task) or 0.0

    assert service.registry.get_sample_value("slipstream_task_inputs_total", {
        "model": "judge", "task": "text-ranking", "reason": "",
    }) == 0.0  # fmt: skip
    await service.stub.RunTask(run_request("a", "bc", WRONG))
    await service.stub.RunTask(run_request("d"))
    assert value("task_inputs_total", reason="") == 3
    assert value("task_inputs_total", reason="PROMPT_TOO_LONG") == 1
    assert value("task_latency_seconds_count") == 4
    assert 0 < value("task_latency_seconds_sum") < 60
    seen = {"gen_ai_operation_name": "text-classification", "gen_ai_provider_name": "slipstream",
            "gen_ai_request_model": "judge"}  # fmt: skip
    durations = [
        service.registry.get_sample_value(
            "gen_ai_server_request_duration_seconds_count", {**seen, "error_type": reason}
        )
        for reason in ("", "PROMPT_TOO_LONG")
    ]
    assert durations == [3, 1]
    queued = service.registry.get_sample_value("slipstream_request_queue_time_seconds_count", {"model": "judge"})
    tokens = service.registry.get_sample_value("slipstream_prompt_tokens_total", {"model": "judge", "adapter": ""})
    assert (queued, tokens) == (2, 1 + 2 + len(WRONG) + 1)  # the fake worker counts letters


async def test_a_model_without_a_head_to_generate_with_does_not_generate(service: Service) -> None:
    request = inference_pb2.GenerateRequest(model="judge", text="hello")
    assert (await refused(service.stub.Generate(request)))[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
