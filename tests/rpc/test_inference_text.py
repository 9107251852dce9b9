"""Text as it is streamed: a scripted worker sends the tokens of a text one by one; no delta holds half a character."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from slipstream.inference.v1 import inference_service_pb2 as inference_pb2
from slipstream.inference.v1 import inference_service_pb2_grpc as inference_grpc
from slipstream.type.v1 import usage_pb2
from slipstream_server.config import ListenConfig
from slipstream_server.rpc.inference.servicer import InferenceServicer
from slipstream_server.rpc.server import Mount, open_server
from unit.inference.conftest import OpenFront, open_front, tokenizer_folder  # noqa: F401 - fixtures
from unit.inference.fake_worker import ANSWER

TEXTS = {
    "emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈, 👍🏽!",
    "right to left": "مرحبا بالعالم ‏שלום‎ עולם",
    "combining": "e\u0301 n\u0303 \u0915\u094d\u0937 Z\u0351\u036b\u0343 ự",
    "beyond the first plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀋 🀄",
    "controls": "tab\tline\r\nbell\a zero\u200bwidth \ufeff \ufffd",
}


@dataclass
class Speaker:
    """A service whose model says whatever its prompt holds."""

    stub: Any
    tokenizer: Tokenizer

    def request(self, text: str) -> tuple[inference_pb2.GenerateRequest, int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        request = inference_pb2.GenerateRequest()
        request.token_ids.ids.extend([ANSWER, *ids])
        request.stopping.max_new_tokens = len(ids)
        return request, len(ids)


@pytest.fixture
async def speaker(
    open_front: OpenFront,  # noqa: F811
    tokenizer_folder: Path,  # noqa: F811
    assert_eventually: Callable[..., Awaitable[None]],
) -> AsyncIterator[Speaker]:
    async with open_front() as fake:
        await assert_eventually(lambda: fake.state == "ready")
        servicer = InferenceServicer(fake.front)  # type: ignore[abstract]
        mount = Mount(inference_grpc.add_InferenceServiceServicer_to_server, servicer)
        async with (
            open_server([mount], ListenConfig()) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
            yield Speaker(inference_grpc.InferenceServiceStub(channel), tokenizer)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_characters_split_across_tokens_arrive_whole(speaker: Speaker, text: str) -> None:
    request, num_tokens = speaker.request(text)
    assert num_tokens > len(text.split())  # the tokens are smaller than words, most smaller than characters
    events = [event async for event in speaker.stub.StreamGenerate(request)]
    deltas = [event.delta for event in events if event.WhichOneof("event") == "delta"]
    assert "".join(delta.text for delta in deltas) == text
    assert sum(delta.text.count("\ufffd") for delta in deltas) == text.count("\ufffd")
    assert [token for delta in deltas for token in delta.token_ids] == list(request.token_ids.ids[1:])
    whole = await speaker.stub.Generate(request)
    assert whole.completions[0].text == text


async def test_a_character_cut_off_by_the_limit_is_replaced_not_broken(speaker: Speaker) -> None:
    request, num_tokens = speaker.request("ok 🀄")
    request.stopping.max_new_tokens = num_tokens - 1
    whole = await speaker.stub.Generate(request)
    assert whole.completions[0].text == "ok \ufffd"


async def test_a_stream_says_at_its_end_too_which_stop_string_ended_it(speaker: Speaker) -> None:
    request, _ = speaker.request("one two three")
    request.stopping.stop.extend(["nothing", "o t"])
    events = [event async for event in speaker.stub.StreamGenerate(request)]
    assert [event.delta.matched_stop for event in events if event.delta.finish_reason] == ["o t"]
    (ended,) = events[-1].finished.completions
    assert (ended.matched_stop, ended.finish_reason) == ("o t", usage_pb2.FINISH_REASON_STOP_STRING)
