"""Workers die in every way; the front stays up, says so, and starts another. Real processes, scripted."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from tests.unit.inference.collecting import collect

from slipstream_server.errors import ModelLoadFailed, ModelNotReady, OutOfMemory, SlipstreamError, WorkerDied
from slipstream_server.inference.calls import DeltaEvent, GenerateCall, StoppingChoice, TokenPrompt
from slipstream_server.inference.streams import GenerationStream
from slipstream_server.inference.supervisor import RestartPolicy
from unit.inference.conftest import FakeModel, OpenFront, is_alive
from unit.inference.fake_worker import ANSWER, ENDLESS, POISON, SILENT, STALL

Eventually = Callable[..., Awaitable[None]]


def call(kind: int, *words: int, max_new_tokens: int = 3) -> GenerateCall:
    return GenerateCall(
        prompt=TokenPrompt(token_ids=(kind, *words)), stopping=StoppingChoice(max_new_tokens=max_new_tokens)
    )


async def ready(fake: FakeModel, eventually: Eventually) -> None:
    await eventually(lambda: fake.state == "ready")


async def read_until_tokens(stream: GenerationStream) -> None:
    async for event in stream:
        if isinstance(event, DeltaEvent):
            return


async def test_loading_is_seen_and_refuses_requests(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        assert fake.state == "loading"
        with pytest.raises(ModelNotReady) as caught:
            await fake.front.open(call(ANSWER, 20))
        assert caught.value.retry_after_s is not None
        seen = []
        async for models in fake.front.subscribe():
            seen.append((models[0].state, models[0].progress))
            if models[0].state == "ready":
                break
        assert seen[0] == ("loading", 0.0)
        assert seen[-1] == ("ready", 1.0)


async def test_kill_fails_the_started_and_requeues_the_others(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        started = await fake.front.open(call(STALL, 20))
        await read_until_tokens(started)
        waiting = await fake.front.open(call(SILENT, 20))
        await assert_eventually(lambda: "submit 2" in fake.lines())
        os.kill(fake.pids()[0], signal.SIGKILL)
        with pytest.raises(WorkerDied):
            await collect(started)
        await assert_eventually(lambda: fake.lines().count("submit 2") == 2)
        await assert_eventually(lambda: fake.state == "ready")
        assert fake.front.status("fake").num_deaths == 1
        waiting.close()
        async with await fake.front.open(call(ANSWER, 20)) as stream:
            assert (await collect(stream)).completions[0].token_ids == (20, 20, 20)


async def test_a_poisoned_request_ends_after_two_deaths_and_takes_nobody_along(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        innocents = [await fake.front.open(call(ANSWER, 20, max_new_tokens=2)) for _ in range(3)]
        poison = await fake.front.open(call(POISON))
        results = await asyncio.gather(*map(collect, [*innocents, poison]), return_exceptions=True)
        assert isinstance(results[-1], WorkerDied)
        assert "2 workers" in results[-1].message
        assert results[-1].retry_after_s is None  # nobody is asked to send it a third time
        for result in results[:-1]:  # started ones may end with their worker, none may vanish or fail otherwise
            assert isinstance(result, WorkerDied) or not isinstance(result, BaseException)
        await assert_eventually(lambda: fake.state == "ready")
        assert fake.front.status("fake").num_deaths == 2


async def test_a_crash_loop_fails_the_model_but_is_retried(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    policy = RestartPolicy(first_delay_s=0.01, max_delay_s=0.01, crash_loop_deaths=3, slow_retry_s=0.1)
    async with open_front(mode="die_when_loading", restart=policy) as fake:
        await assert_eventually(lambda: fake.state == "failed")
        with pytest.raises(WorkerDied, match="3 workers died in a row; the last one exited with status 4"):
            await fake.front.open(call(ANSWER))
        await assert_eventually(lambda: len(fake.pids()) > 4)


@pytest.mark.parametrize(
    ("mode", "text"),
    [("die_before_connecting", "before it connected"), ("garbage", "bytes that are no event")],
)
async def test_workers_that_never_speak_properly_are_deaths(
    open_front: OpenFront, assert_eventually: Eventually, mode: str, text: str
) -> None:
    policy = RestartPolicy(first_delay_s=0.01, max_delay_s=0.01, crash_loop_deaths=1, slow_retry_s=60.0)
    async with open_front(mode=mode, restart=policy) as fake:
        await assert_eventually(lambda: fake.state == "failed")
        error = fake.front.status("fake").error
        assert error is not None
        assert text in error.message


async def test_a_model_that_cannot_be_loaded_says_why(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front(mode="load_failed") as fake:
        await assert_eventually(lambda: fake.state == "failed")
        with pytest.raises(OutOfMemory, match="needs more"):
            await fake.front.open(call(ANSWER))
        assert len(fake.pids()) == 1


async def test_a_model_without_a_tokenizer_says_why(
    open_front: OpenFront, assert_eventually: Eventually, tmp_path: Path
) -> None:
    async with open_front(folder=tmp_path) as fake:
        await assert_eventually(lambda: fake.state == "failed")
        with pytest.raises(ModelLoadFailed, match=r"tokenizer\.json"):
            await fake.front.open(call(ANSWER))


async def test_closing_leaves_no_process_task_or_descriptor(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    descriptors, tasks = os.listdir("/proc/self/fd"), asyncio.all_tasks()
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        stream = await fake.front.open(call(ENDLESS, 20))
        await read_until_tokens(stream)
        pid = fake.pids()[0]
        assert is_alive(pid)
    assert not is_alive(pid)
    assert "shutdown" in fake.lines()
    with pytest.raises(SlipstreamError):
        await collect(stream)
    await assert_eventually(lambda: asyncio.all_tasks() == tasks)
    await assert_eventually(lambda: len(os.listdir("/proc/self/fd")) <= len(descriptors))


@pytest.mark.parametrize("operators", [None, "7"])
async def test_workers_spin_briefly_and_keep_few_products_unless_told_otherwise_and_ask_no_hub(
    open_front: OpenFront, assert_eventually: Eventually, monkeypatch: pytest.MonkeyPatch, operators: str | None
) -> None:
    expected = {"GOMP_SPINCOUNT": "30000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in expected:
        monkeypatch.delenv(name, raising=False)
        if operators is not None:
            monkeypatch.setenv(name, operators)
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        environment = psutil.Process(fake.pids()[0]).environ()
    assert {name: environment[name] for name in expected} == {name: operators or expected[name] for name in expected}
    assert environment["HF_HUB_OFFLINE"] == "1"


async def test_many_restarts_leak_nothing(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front(restart=RestartPolicy(first_delay_s=0.001, max_delay_s=0.001, crash_loop_deaths=99)) as fake:
        await ready(fake, assert_eventually)
        descriptors, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
        for deaths in range(1, 5):
            os.kill(fake.pids()[-1], signal.SIGKILL)
            await assert_eventually(lambda deaths=deaths: fake.front.status("fake").num_deaths == deaths)
            await assert_eventually(lambda: fake.state == "ready")
        await assert_eventually(lambda: len(os.listdir("/proc/self/fd")) == descriptors)
        await assert_eventually(lambda: len(asyncio.all_tasks()) == tasks)
        assert not any(map(is_alive, fake.pids()[:-1]))
