"""Slipstream as its users meet it: the real service, its client, one stream for each request."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from tests.bench.engine.requests import Answer, Request
from tests.bench.engine.sides.loop import Clock, serve
from tests.bench.service import inference_service

from slipstream_client import SlipstreamClient

TIMEOUT_S = 900.0


class GrpcSide:
    """A service and a client with one connection. The loop runs only while something is asked of it."""

    streams = True

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._loop = asyncio.new_event_loop()
        self._exits = contextlib.AsyncExitStack()
        self._facts: dict[str, Any] = {}
        self._client = self._loop.run_until_complete(self._start(arguments))

    def facts(self) -> dict[str, Any]:
        return self._facts

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        return self._loop.run_until_complete(self._run(requests))

    def close(self) -> None:
        """Stop the service."""
        self._loop.run_until_complete(self._exits.aclose())

    async def _start(self, arguments: argparse.Namespace) -> SlipstreamClient:
        flags = [
            f"--set=inference.{setting}"
            for setting in (
                f"batching={arguments.batching}",
                f"dtype={arguments.dtype}",
                f"max_batch_size={arguments.concurrency}",
                f"threads={arguments.threads}",
                *arguments.set,
            )
        ]
        model = f"bench={arguments.model_folder}"
        address = await self._exits.enter_async_context(inference_service(model, *flags))
        client = await self._exits.enter_async_context(SlipstreamClient(inference_address=address))
        served = (await client.models.list())[0]
        self._facts = {"dtype": served.data_type, "batching": arguments.batching}
        return client

    async def _run(self, requests: Sequence[Request]) -> list[Answer]:
        clock = Clock()
        return list(await asyncio.gather(*(self._answer(request, clock) for request in requests)))

    async def _answer(self, request: Request, clock: Clock) -> Answer:
        await asyncio.sleep(request.arrival_s - clock.now_s() if request.arrival_s else 0)
        answer = Answer()
        stream = self._client.stream_generate(
            request.prompt,
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            ignore_eos=True,
            timeout_s=TIMEOUT_S,
        )
        async for delta in stream:
            answer.add(delta.token_ids, clock.now_s())
        answer.cached_prompt_tokens = stream.usage.cached_prompt_tokens
        return answer


def main() -> None:
    made: list[GrpcSide] = []

    def make(arguments: argparse.Namespace) -> GrpcSide:
        made.append(GrpcSide(arguments))
        return made[0]

    try:
        serve(make)
    finally:
        for side in made:
            side.close()


if __name__ == "__main__":
    main()
