"""Slipstream's engine alone: no front, no socket, no gRPC, no detokenizer."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slipstream_server.inference.worker_process import UNLESS_SET

os.environ.update({**UNLESS_SET, **os.environ})  # as the service does for its workers; before torch is imported

import msgspec
from tests.bench.engine.requests import Answer, Request
from tests.bench.engine.sides.loop import run_in_steps, serve

from slipstream_server.inference.engine.assembly import assemble
from slipstream_server.inference.engine.cores import bind_team
from slipstream_server.inference.generation import Admitted, Failed, GenerationRequest, Sampling, Stopping, Tokens
from slipstream_server.inference.worker_config import WorkerConfig, decode_config

# Settings of the service that a worker's configuration has by the same name.
_WORKER_KEYS = frozenset(WorkerConfig.__struct_fields__)


class EngineSide:
    """The engine of a worker, driven by hand."""

    streams = True

    def __init__(self, arguments: argparse.Namespace) -> None:
        # As a worker does: another thread loads, so that the one that computes can be bound with its team.
        with ThreadPoolExecutor(1) as background:
            loading = background.submit(assemble, _config(arguments), _ignore, lambda: None)
            self._engine, self._ready = loading.result()
        if self._ready.device == "cpu":
            bind_team()
        self._ids = itertools.count(1)

    def facts(self) -> dict[str, Any]:
        return {"settings": self._ready.settings, "batching": self._ready.batching, "dtype": self._ready.dtype}

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        indices: dict[int, int] = {}
        cached: dict[int, int] = {}

        def submit(index: int, request: Request) -> None:
            number = next(self._ids)
            indices[number] = index
            self._engine.submit(_generation(number, request))

        def step() -> Iterator[tuple[int, Sequence[int]]]:
            time.sleep(min(self._engine.wait_s() or 0.0, 0.01))
            for event in self._engine.step():
                if isinstance(event, Failed):
                    raise RuntimeError(f"request failed: {event.message}")
                if isinstance(event, Admitted):
                    cached[indices[event.id]] = event.cached_prompt_tokens
                elif isinstance(event, Tokens):
                    yield indices[event.id], event.token_ids

        answers = run_in_steps(requests, submit, step)
        while self._engine.wait_s() is not None:  # what is left to say after the last token
            self._engine.step()
        for index, answer in enumerate(answers):
            answer.cached_prompt_tokens = cached.get(index)
        return answers


def _generation(number: int, request: Request) -> GenerationRequest:
    return GenerationRequest(
        id=number,
        prompt_token_ids=request.prompt,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=request.max_new_tokens),
    )


def _config(arguments: argparse.Namespace) -> WorkerConfig:
    """The worker's configuration; a setting that a worker does not know is none of the engine's."""
    values: dict[str, Any] = {
        "model_folder": str(Path(arguments.model_folder)),
        "load": {"dtype": arguments.dtype},
        "engine": arguments.batching,
        "max_batch_size": arguments.concurrency,
        "threads": arguments.threads,
    }
    for setting in arguments.set:
        key, _, value = setting.partition("=")
        if key in _WORKER_KEYS:
            values[key] = _value(value)
    return decode_config(msgspec.json.encode(values).decode())


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _ignore(_fraction: float, _stage: str) -> None:
    pass


if __name__ == "__main__":
    serve(EngineSide)
