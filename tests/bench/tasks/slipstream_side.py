"""Slipstream over gRPC: so many callers, each with one text in a call and the next one after the answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench.service import inference_service
from tests.bench.tasks.side import CLASSIFY, EMBED, Done

from slipstream_client import SlipstreamClient
from slipstream_client.task_results import Classification

Ask = Callable[[str], Awaitable[Sequence[float]]]


async def by_callers(texts: Sequence[str], num_callers: int, ask: Callable[[int], Ask]) -> Done:
    """All texts, asked by callers that work side by side; ``ask`` is made once for each caller, by its number."""
    values: list[Sequence[float]] = [()] * len(texts)
    waiting = iter(enumerate(texts))

    async def call(number: int, mine: Iterator[tuple[int, str]]) -> None:
        own = ask(number)
        for place, text in mine:
            values[place] = await own(text)

    start_s = time.perf_counter()
    await asyncio.gather(*(call(number, waiting) for number in range(num_callers)))
    return Done(time.perf_counter() - start_s, values)


class SlipstreamSide:
    """Both models in one service, through one client."""

    def __init__(self, client: SlipstreamClient, num_callers: int, facts: dict[str, Any]) -> None:
        self._client = client
        self._num_callers = num_callers
        self._facts = facts

    async def run(self, work: str, texts: Sequence[str]) -> Done:
        ask = {EMBED: self._embed, CLASSIFY: self._classify}[work]
        return await by_callers(texts, self._num_callers, lambda _: ask)

    def facts(self) -> dict[str, Any]:
        return self._facts

    async def _embed(self, text: str) -> Sequence[float]:
        return (await self._client.tasks.embed(text, model=EMBED))[0]

    async def _classify(self, text: str) -> Sequence[float]:
        found: Classification = (await self._client.tasks.classify(text, model=CLASSIFY, top_k=2))[0]
        return [label.score for label in sorted(found.labels, key=lambda label: label.label_id)]


@contextlib.asynccontextmanager
async def slipstream(
    encoder: Path, classifier: Path, *, num_callers: int, device: str, settings: Sequence[str]
) -> AsyncIterator[SlipstreamSide]:
    """The service with both models, ready."""
    flags = ["--model", f"{CLASSIFY}={classifier}", "--device", device]
    flags += [part for setting in settings for part in ("--set", f"inference.{setting}")]
    async with (
        inference_service(f"{EMBED}={encoder}", *flags) as address,
        SlipstreamClient(inference_address=address) as client,
    ):
        for work in (EMBED, CLASSIFY):
            await client.models.wait(work)
        served = await client.models.get(EMBED)
        yield SlipstreamSide(client, num_callers, {"device": served.devices[0], "dtype": served.data_type})
