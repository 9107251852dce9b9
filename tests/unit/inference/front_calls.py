"""Calls to a front over a scripted worker."""

from __future__ import annotations

from typing import Any

from tests.conftest import Eventually

from slipstream_server.inference.calls import GenerateCall, StoppingChoice, TokenPrompt
from unit.inference.conftest import FakeModel
from unit.inference.fake_worker import ANSWER


def call(kind: int, *words: int, max_new_tokens: int = 3) -> GenerateCall:
    return GenerateCall(
        prompt=TokenPrompt(token_ids=(kind, *words)), stopping=StoppingChoice(max_new_tokens=max_new_tokens)
    )


def answer(fake: FakeModel, text: str, **stopping: object) -> GenerateCall:
    """A call whose answer is ``text``, token by token."""
    encoder = fake.front._models["fake"].text
    ids = encoder.tokenizer.encode(text, add_special_tokens=False)
    wanted: dict[str, Any] = {"max_new_tokens": len(ids), **stopping}
    return GenerateCall(
        prompt=TokenPrompt(token_ids=(ANSWER, *ids)),
        stopping=StoppingChoice(**wanted),
    )


async def ready(fake: FakeModel, eventually: Eventually) -> FakeModel:
    await eventually(lambda: fake.state == "ready")
    return fake
