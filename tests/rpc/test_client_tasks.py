"""The Python client and the command line run tasks over a real server; the worker plays a script."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import typer
from tests.rpc.test_tasks import Service, service  # noqa: F401 - fixture
from tests.rpc.test_tasks_convert import MADE

from slipstream_client import InvalidRequestError, NotFoundError, ServerError, SlipstreamClient, SyncSlipstreamClient
from slipstream_client.cli.task_inputs import Words, inputs_of
from slipstream_client.cli.task_view import TaskView
from slipstream_client.task_results import RESULTS, result_from_proto
from slipstream_server.rpc.inference.task_results import task_result
from slipstream_server.tasks.registry import get_task
from unit.inference.fake_task_worker import WRONG


@pytest.fixture
async def client(service: Service) -> AsyncIterator[SlipstreamClient]:  # noqa: F811
    async with SlipstreamClient(f"127.0.0.1:{service.port}") as opened:
        yield opened


async def test_the_client_runs_tasks(client: SlipstreamClient) -> None:
    answer = await client.run_task("sentiment-analysis", ["four", WRONG], parameters={"top_k": 2})
    assert answer.model == "models/judge"
    assert answer.results[0].value.labels[0].label_id == 4
    assert answer.results[1].error is not None
    assert answer.results[1].error.reason == "PROMPT_TOO_LONG"
    with pytest.raises(ServerError, match="input 1"):
        answer.values()
    (classified,) = await client.tasks.classify("three")
    assert classified.labels[0].label == "ok"
    with pytest.raises(InvalidRequestError, match="top_k"):
        await client.run_task("sentiment-analysis", "a", parameters={"topk": 1})
    with pytest.raises(InvalidRequestError, match=r"inputs\[0\]"):
        await client.run_task("sentiment-analysis", {"text": "a", "image": b"x"})


async def test_the_client_streams_tasks(client: SlipstreamClient) -> None:
    texts = ["a" * (place % 11 + 1) for place in range(500)]
    found = {result.index: result.value.labels[0].label_id
             async for result in client.stream_task("text-classification", texts)}  # fmt: skip
    assert found == {place: len(text) for place, text in enumerate(texts)}

    async def some() -> AsyncIterator[str]:
        for text in ("x", "yy"):
            yield text

    assert len([result async for result in client.tasks.stream("text-classification", some())]) == 2
    with pytest.raises(InvalidRequestError, match="did you mean"):
        _ = [result async for result in client.tasks.stream("text-clasification", ["a"])]


async def test_the_client_describes_tasks(client: SlipstreamClient) -> None:
    tasks = await client.tasks.list(model="judge")
    assert [task.id for task in tasks] == ["text-classification", "text-ranking", "zero-shot-classification"]
    task = await client.tasks.describe("ner")
    assert task.id == "token-classification"
    assert task.families == ("encoder", "decoder", "encoder_decoder")
    defaults = {parameter.name: parameter.default_value for parameter in task.parameters}
    assert (defaults["aggregation_strategy"], defaults["ignore_labels"], defaults["stride"]) == ("none", ["O"], None)
    with pytest.raises(NotFoundError):
        await client.tasks.describe("nothing")


async def command(service: Service, *words: str) -> tuple[int, str, str]:  # noqa: F811
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "slipstream_client.cli", *words, "--address", f"127.0.0.1:{service.port}",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_command_line_runs_tasks(service: Service, tmp_path: Path) -> None:  # noqa: F811
    code, out, _ = await command(service, "run", "text-classification", "four", "-p", "top_k=2")
    assert code == 0
    assert "ok" in out
    assert "0.5000" in out
    code, out, err = await command(service, "run", "text-classification", "four", WRONG, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert lines[0]["value"]["labels"][0]["label_id"] == 4
    assert lines[1]["error"]["reason"] == "PROMPT_TOO_LONG"
    path = tmp_path / "inputs.jsonl"
    path.write_text('"one"\n{"text": "three"}\n')
    code, out, _ = await command(service, "run", "text-classification", "--file", str(path), "--json")
    assert code == 0
    assert {json.loads(line)["index"] for line in out.splitlines()} == {0, 1}
    code, _, err = await command(service, "run", "text-classification", "--label", "x", "four")
    assert code == 2
    assert "--label" in err
    code, _, err = await command(service, "run", "text-classification", "four", "--model", "jugde")
    assert code == 1
    assert "did you mean 'judge'?" in err
    code, out, _ = await command(service, "tasks", "describe", "sentiment-analysis")
    assert "function_to_apply" in out
    code, out, _ = await command(service, "tasks", "list", "--json")
    assert "summarization" in {json.loads(line)["name"].removeprefix("tasks/") for line in out.splitlines()}


@pytest.mark.parametrize(
    ("task", "option"),
    [
        ("question-answering", "--context"),
        ("zero-shot-classification", "--label"),
        ("text-ranking", "--document"),
        ("image-classification", "--file, a picture"),
        ("visual-question-answering", "--file, a picture"),
        ("document-question-answering", "--file inputs.jsonl"),
        ("table-question-answering", "--file inputs.jsonl"),
    ],
)
def test_who_gives_a_text_alone_is_told_what_belongs_to_it(task: str, option: str) -> None:
    with pytest.raises(typer.BadParameter, match=option):
        inputs_of(Words(texts=["Who?"]), get_task(task).input_kinds)


def test_the_synchronous_client_runs_tasks() -> None:
    with SyncSlipstreamClient("127.0.0.1:1", timeout_s=1) as client:
        assert callable(client.run_task)
        with pytest.raises(InvalidRequestError):
            client.run_task("text-classification", {"nothing": 1})


@pytest.mark.parametrize("kind", sorted(RESULTS))
def test_every_kind_of_result_is_shown(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = TaskView(tmp_path / "out")
    view.show(result_from_proto(task_result(MADE[kind]), 0), "Adam and Eve")
    assert capsys.readouterr().out.strip()
    has_files = kind in ("segmentation", "mask_generation", "depth", "image", "audio")
    assert (tmp_path / "out").exists() == has_files
