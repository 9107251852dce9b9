"""The front from call to stream, over a scripted worker."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tests.conftest import Eventually
from tests.unit.inference.collecting import collect
from tests.unit.inference.front_calls import answer, call, ready

from slipstream_server.errors import (
    InvalidField,
    ModelNotFound,
    OutOfMemory,
    PromptTooLong,
    QueueFull,
    ResourceExists,
    Unavailable,
    UnsupportedField,
)
from slipstream_server.inference.admission import AdmissionLimits
from slipstream_server.inference.calls import (
    ChatMessage,
    ChatPrompt,
    DeltaEvent,
    FinishedEvent,
    GenerateCall,
    ResponseChoice,
    SamplingChoice,
    StartedEvent,
    StoppingChoice,
    TextPrompt,
    TokenPrompt,
)
from slipstream_server.inference.front import FrontConfig, InferenceFront
from unit.inference.conftest import OpenFront
from unit.inference.fake_worker import ANSWER, FAIL, SILENT, STALL


async def test_a_stream_starts_tells_and_finishes(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        text = "hello world, émile 🙂"
        async with await fake.front.open(answer(fake, text)) as stream:
            events = [event async for event in stream]
        assert events[0] == StartedEvent(model="fake")
        assert isinstance(events[-1], FinishedEvent)
        deltas = [event for event in events if isinstance(event, DeltaEvent)]
        assert len(deltas) == len(events) - 2
        assert "".join(delta.text for delta in deltas) == text
        assert all("\ufffd" not in delta.text for delta in deltas)
        assert [delta.finish_reason for delta in deltas][-1] == "length"
        assert events[-1].finish_reasons == ("length",)
        assert events[-1].completion_tokens == sum(len(delta.token_ids) for delta in deltas)
        assert fake.front.num_streams == 0


async def test_a_stop_string_cuts_the_text_and_ends_the_sequence(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        plain = answer(fake, "hello world and everyone", stop=("lo wo", "zzz"), max_new_tokens=1000)
        result = await collect(await fake.front.open(plain))
        done = result.completions[0]
        assert (done.text, done.finish_reason, done.matched_stop) == ("hel", "stop_string", "lo wo")
        assert any(line.startswith("end ") for line in fake.lines())
        tokenizer = fake.front._models["fake"].text.tokenizer
        assert "lo wo" in tokenizer.decode(done.token_ids)
        assert "lo wo" not in tokenizer.decode(done.token_ids[:-1])
        assert result.usage.completion_tokens == len(done.token_ids)
        kept = replace(plain, response=ResponseChoice(include_stop=True))
        assert (await collect(await fake.front.open(kept))).completions[0].text == "hello wo"


async def test_sequences_are_told_apart(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        wanted = replace(
            answer(fake, "hello"),
            sampling=SamplingChoice(do_sample=True),
            response=ResponseChoice(num_return_sequences=3, echo=True),
        )
        result = await collect(await fake.front.open(wanted))
        assert [done.index for done in result.completions] == [0, 1, 2]
        assert len({done.text for done in result.completions}) == 1
        assert result.completions[0].text.endswith("hello")
        assert len(result.completions[0].text) > len("hello")


async def test_echo_puts_the_prompts_text_first(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        prompt = TextPrompt(text="hello world")
        wanted = GenerateCall(
            prompt=prompt, stopping=StoppingChoice(max_new_tokens=1), response=ResponseChoice(echo=True)
        )
        async with await fake.front.open(wanted) as stream:
            events = [event async for event in stream]
        deltas = [event for event in events if isinstance(event, DeltaEvent)]
        assert deltas[0].text.startswith("hello world")
        assert sum(len(delta.token_ids) for delta in deltas) == 1


async def test_a_full_queue_refuses(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front(max_batch_size=1, admission=AdmissionLimits(max_requests=3)) as fake:
        await ready(fake, assert_eventually)
        streams = [await fake.front.open(call(SILENT)) for _ in range(5)]
        with pytest.raises(QueueFull) as caught:
            await fake.front.open(call(SILENT))
        assert caught.value.retry_after_s is not None
        for stream in streams:
            stream.close()


async def test_a_request_that_fails_in_the_worker_fails_alone(
    open_front: OpenFront, assert_eventually: Eventually
) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        bad, good = await fake.front.open(call(FAIL)), await fake.front.open(call(ANSWER, 20))
        results = await asyncio.gather(collect(bad), collect(good), return_exceptions=True)
        assert isinstance(results[0], OutOfMemory)
        assert not isinstance(results[1], BaseException)


async def test_what_cannot_be_served_is_refused_by_name(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        opened = fake.front.open
        with pytest.raises(ModelNotFound):
            await opened(replace(call(ANSWER), model="other"))
        with pytest.raises(UnsupportedField, match="adapter"):
            await opened(replace(call(ANSWER), adapter="support"))
        for text in ("", "a\0b", "a\ud800b"):
            with pytest.raises(InvalidField, match="text"):
                await opened(GenerateCall(prompt=TextPrompt(text=text)))
        for ids in ((), (-1,), (400,), (2**63,)):
            with pytest.raises(InvalidField, match="token_ids"):
                await opened(GenerateCall(prompt=TokenPrompt(token_ids=ids)))
        started_s = time.monotonic()
        with pytest.raises(InvalidField, match="text"):
            await opened(GenerateCall(prompt=TextPrompt(text="x" * 10_000_000)))
        with pytest.raises(PromptTooLong):
            await opened(GenerateCall(prompt=TextPrompt(text="x" * 1_000_000)))
        assert time.monotonic() - started_s < 1.0
        assert fake.front.num_streams == 0


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (ChatPrompt(messages=()), r"chat\.messages"),
        (ChatPrompt(messages=(ChatMessage(role="boss", content="x"),)), r"chat\.messages\[0\]\.role"),
        (ChatPrompt(messages=(ChatMessage(role="user", content="a\0"),)), r"chat\.messages\[0\]\.content"),
        (ChatPrompt(messages=(ChatMessage(role="user", content="\ud800"),)), r"chat\.messages\[0\]\.content"),
        (
            ChatPrompt(messages=(ChatMessage(role="user", content="x"),), template_parameters={"messages": 1}),
            r"chat\.template_parameters\.messages",
        ),
        (
            ChatPrompt(messages=(ChatMessage(role="user", content="x"),), continue_final_message=True),
            r"chat\.continue_final_message",
        ),
        (
            ChatPrompt(messages=(ChatMessage(role="user", content="x"),), tools=({"a": "\0"},)),
            r"chat\.tools",
        ),
    ],
)
async def test_bad_chats_are_refused(
    open_front: OpenFront, assert_eventually: Eventually, chat: ChatPrompt, field: str
) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        with pytest.raises(InvalidField, match=field):
            await fake.front.open(GenerateCall(prompt=chat))


async def test_tokens_can_be_made_counted_and_read_back(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        spans = await fake.front.tokenize("", "hello world")
        assert "".join("hello world"[span.start : span.end] for span in spans) == "hello world"
        ids = tuple(span.token_id for span in spans)
        assert await fake.front.detokenize("fake", ids) == "hello world"
        assert await fake.front.count_tokens("fake", TextPrompt(text="hello world")) == len(ids)
        chat = ChatPrompt(messages=(ChatMessage(role="user", content="hello"),))
        assert await fake.front.count_tokens("fake", chat) > 3
        with pytest.raises(InvalidField, match=r"token_ids\[0\]"):
            await fake.front.detokenize("fake", (400,))


async def test_models_come_and_go(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        with pytest.raises(ResourceExists):
            fake.front.add_model(fake.front._models["fake"].plan)
        running = await fake.front.open(call(STALL, 20))
        await fake.front.remove_model("fake")
        with pytest.raises(Unavailable):
            await collect(running)
        with pytest.raises(ModelNotFound):
            await fake.front.open(call(ANSWER))
        assert fake.front.models() == ()


async def test_metrics_count_what_happened(open_front: OpenFront, assert_eventually: Eventually) -> None:
    async with open_front() as fake:
        await ready(fake, assert_eventually)
        await collect(await fake.front.open(call(ANSWER, 20, 21)))
        with pytest.raises(OutOfMemory):
            await collect(await fake.front.open(call(FAIL)))

        def value(name: str, **labels: str) -> float | None:
            return fake.registry.get_sample_value(f"slipstream_{name}", {"model": "fake", **labels})

        assert value("prompt_tokens_total", adapter="") == 3 + 1
        assert value("generation_tokens_total", adapter="") == 3
        assert value("request_success_total", adapter="", finish_reason="length") == 1
        assert value("request_failure_total", adapter="", reason="OUT_OF_MEMORY") == 1
        assert value("time_to_first_token_seconds_count") == 1
        assert value("inter_token_latency_seconds_count") == 2
        assert value("e2e_request_latency_seconds_count") == 1
        assert value("request_queue_time_seconds_count") == 2
        assert value("num_requests_running") == 0
        assert value("num_requests_waiting") == 0


async def test_a_front_with_nothing_says_so() -> None:
    front = InferenceFront(FrontConfig())
    await front.start()
    with pytest.raises(ModelNotFound):
        await front.open(call(ANSWER))
    await front.close()
    await front.wait_stopped()


def test_the_front_imports_neither_torch_nor_grpc() -> None:
    script = (
        "import pkgutil, importlib, sys, slipstream_server.inference as room\n"
        "names = [m.name for m in pkgutil.iter_modules(room.__path__) if m.name not in ('worker', 'engine')]\n"
        "[importlib.import_module(f'slipstream_server.inference.{name}') for name in names]\n"
        "assert 'front' in names\n"
        "bad = {'torch', 'transformers', 'grpc', 'google.protobuf'} & sys.modules.keys()\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
