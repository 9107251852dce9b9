"""The bench's hold on the program with the pipelines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench.tasks.side import Done, SideFailed

_MAX_LINE_BYTES = 1 << 28
BATCH_SIZES = (8, 16, 32, 64)


class PipelineProgram:
    """One program; it does one thing at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.facts: dict[str, Any] = {}

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        await self._process.stdin.drain()
        return await self.read()

    async def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise SideFailed(f"the pipelines ended with exit code {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class PipelineSide:
    """The pipelines with one size of batch for each kind of work; 1: a text at a time."""

    def __init__(self, program: PipelineProgram, batch_sizes: dict[str, int]) -> None:
        self._program = program
        self._batch_sizes = batch_sizes

    async def run(self, work: str, texts: Sequence[str]) -> Done:
        question = {"work": work, "texts": list(texts), "batch_size": self._batch_sizes.get(work, 1)}
        answer = await self._program.ask(question)
        return Done(answer["seconds"], answer["values"])

    def facts(self) -> dict[str, Any]:
        return {**self._program.facts, "batch_sizes": self._batch_sizes}


async def best_batch_size(program: PipelineProgram, work: str, texts: Sequence[str]) -> int:
    """The size of batch with which the pipeline is fastest on these texts."""
    seconds = {size: (await PipelineSide(program, {work: size}).run(work, texts)).seconds for size in BATCH_SIZES}
    return min(seconds, key=lambda size: seconds[size])


@contextlib.asynccontextmanager
async def pipelines(encoder: Path, classifier: Path, device: str) -> AsyncIterator[PipelineProgram]:
    """The program, loaded."""
    command = [sys.executable, str(Path(__file__).parent / "pipelines.py"), "--device", device]
    command += ["--encoder", str(encoder), "--classifier", str(classifier)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_MAX_LINE_BYTES
    )
    try:
        program = PipelineProgram(process)
        program.facts = (await program.read())["ready"]
        yield program
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
