"""A task worker that plays a script on the real socket: ``python fake_task_worker.py SOCKET LOG``.

What becomes of an input is said by its text (see the constants); any other is answered by the label "ok" whose id is
the length of the text. Every command it receives is written to LOG, a line each.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from slipstream_server.inference.generation import (
    Admitted,
    Cancel,
    Event,
    Failed,
    Finished,
    Ready,
    Shutdown,
    SubmitTask,
    TaskResults,
    decode_command,
    encode_events,
)
from slipstream_server.tasks.items import ClassificationResult, ItemError, LabelScore, TaskRequest, TextInput

POISON, POISON_ONCE, SILENT, WRONG, FAIL_ALL = "poison", "poison once", "silent", "wrong", "fail all"
"""Kill the worker, each or the first time; never answer; fail alone; fail with all of its request."""


class FakeTaskWorker:
    def __init__(self, writer: asyncio.StreamWriter, log: Path) -> None:
        self.writer = writer
        self.log = log

    def send(self, *events: Event) -> None:
        self.writer.write(encode_events(list(events)))

    def note(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {text}\n")

    def answer(self, request: TaskRequest) -> None:
        texts = [item.text for item in request.inputs if isinstance(item, TextInput)]
        if POISON in texts or (POISON_ONCE in texts and f"submit {request.id}" not in self.before):
            os.kill(os.getpid(), signal.SIGKILL)
        self.send(Admitted(request.id))
        if FAIL_ALL in texts:
            self.send(Failed(request.id, "OUT_OF_MEMORY", "no room"))
            return
        # In reverse: nobody may rely on the order.
        for index in reversed(range(len(texts))):
            if texts[index] == SILENT:
                continue
            result = (
                ItemError("PROMPT_TOO_LONG", "text: far too long", "text")
                if texts[index] == WRONG
                else ClassificationResult([LabelScore("ok", 0.5, len(texts[index]))])
            )
            self.send(TaskResults(request.id, [index], [result], len(texts[index])))
        if SILENT not in texts:
            self.send(Finished(request.id))

    async def serve(self, reader: asyncio.StreamReader) -> None:
        self.before = self.log.read_text() if self.log.exists() else ""
        self.note("started")
        self.send(Ready(device="cpu", dtype="float32", attention="none", batching="tasks", memory_bytes=1))
        while True:
            try:
                size = int.from_bytes(await reader.readexactly(4), "big")
                command = decode_command(await reader.readexactly(size))
            except asyncio.IncompleteReadError:
                return
            match command:
                case SubmitTask(request):
                    self.note(f"submit {request.id}")
                    self.answer(request)
                case Cancel(request_id):
                    self.note(f"cancel {request_id}")
                case Shutdown():
                    return
            await self.writer.drain()


async def main(path: str, log: Path) -> None:
    if log.with_suffix(".held").exists():  # as a model that takes long to load again
        await asyncio.sleep(99)
    reader, writer = await asyncio.open_unix_connection(path)
    await FakeTaskWorker(writer, log).serve(reader)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
