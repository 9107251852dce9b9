"""A worker that plays a script on the real socket, run as a process: ``python fake_worker.py SOCKET MODE LOG``.

What a request does is said by the first token of its prompt (see the constants); tokens it sends are those of the
prompt after the first one, over and over. Every command it receives is written to LOG, a line each.
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
    EndSequence,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    Submit,
    Tokens,
    decode_command,
    encode_events,
)

ANSWER, POISON, SILENT, STALL, FAIL, ENDLESS = range(10, 16)
"""Answer to the end; kill the worker; say nothing; stop after one token; fail; answer until stopped."""


class FakeWorker:
    def __init__(self, writer: asyncio.StreamWriter, log: Path) -> None:
        self.writer = writer
        self.log = log
        self.running: dict[int, GenerationRequest] = {}
        self.ended: set[tuple[int, int]] = set()
        self.sent: dict[int, int] = {}

    def send(self, *events: Event) -> None:
        self.writer.write(encode_events(list(events)))

    def note(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {text}\n")

    def obey(self, command: Submit | Cancel | EndSequence | Shutdown) -> None:
        match command:
            case Submit(request):
                self.note(f"submit {request.id}")
                self.start(request)
            case Cancel(request_id):
                self.note(f"cancel {request_id}")
                self.running.pop(request_id, None)
            case EndSequence(request_id, index):
                self.note(f"end {request_id} {index}")
                self.ended.add((request_id, index))
            case Shutdown():
                self.note("shutdown")
                os._exit(0)

    def start(self, request: GenerationRequest) -> None:
        kind = request.prompt_token_ids[0]
        if kind == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        self.send(Admitted(request.id))
        if kind == FAIL:
            self.send(Failed(request.id, "OUT_OF_MEMORY", "no room"))
        elif kind != SILENT:
            self.running[request.id] = request

    def step(self) -> None:
        for request in list(self.running.values()):
            self.send(*self.advance(request))

    def advance(self, request: GenerationRequest) -> list[Event]:
        place = self.sent.get(request.id, 0)
        self.sent[request.id] = place + 1
        words = request.prompt_token_ids[1:] or (20,)
        is_last = request.prompt_token_ids[0] != ENDLESS and place + 1 == request.stopping.max_new_tokens
        live = [i for i in range(request.num_return_sequences) if (request.id, i) not in self.ended]
        reason: FinishReason | None = "length" if is_last else None
        events: list[Event] = [Tokens(request.id, i, [words[place % len(words)]], None, reason) for i in live]
        if is_last or not live:
            events.append(Finished(request.id))
        if is_last or not live or request.prompt_token_ids[0] == STALL:
            del self.running[request.id]
        return events


async def serve(path: str, mode: str, log: Path) -> None:
    if mode == "die_before_connecting":
        sys.exit(3)
    reader, writer = await asyncio.open_unix_connection(path)
    worker = FakeWorker(writer, log)
    worker.note("started")
    worker.send(Loading(0.5, "half"))
    if mode == "load_failed":
        worker.send(LoadFailed("OUT_OF_MEMORY", "needs more"))
        await writer.drain()
        sys.exit(3)
    if mode == "garbage":
        writer.write((7).to_bytes(4, "big") + b"garbage")
        await asyncio.sleep(60)
    if mode == "die_when_loading":
        sys.exit(4)
    worker.send(Ready(device="cpu", dtype="float32", attention="none", batching="fake", memory_bytes=1))
    receiving = asyncio.create_task(receive(reader, worker))
    while not receiving.done():
        worker.step()
        await writer.drain()
        await asyncio.sleep(0.001)
    receiving.result()


async def receive(reader: asyncio.StreamReader, worker: FakeWorker) -> None:
    while True:
        try:
            size = int.from_bytes(await reader.readexactly(4), "big")
            worker.obey(decode_command(await reader.readexactly(size)))
        except asyncio.IncompleteReadError:
            return


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
