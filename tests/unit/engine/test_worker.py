"""The worker process over a real unix socket: what it answers, and that nothing keeps it alive when it has to go."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.unit.engine.driving import generate_alone, prompts, request
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream_server.inference.engine.null import NULL_TOKEN_ID
from slipstream_server.inference.generation import (
    Cancel,
    EndSequence,
    Event,
    Failed,
    Finished,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    Submit,
    Tokens,
    decode_events,
    encode_command,
    frame,
)
from slipstream_server.inference.worker import EXIT_LOAD_FAILED
from slipstream_server.inference.worker_config import WorkerConfig, decode_config, encode_config, worker_command
from slipstream_server.models.load_options import LoadOptions

TIMEOUT_S = 60.0
NULL = WorkerConfig(engine="null")


class Peer:
    """The front's end of the socket."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.connection = connection
        self.process = process
        connection.settimeout(TIMEOUT_S)
        self._stream = connection.makefile("rb")

    def send(self, *commands: Any) -> None:
        self.connection.sendall(b"".join(encode_command(command) for command in commands))

    def events(self) -> Iterator[Event]:
        while header := self._stream.read(4):
            yield from decode_events(self._stream.read(int.from_bytes(header, "big")))

    def events_until(self, last: Callable[[Event], bool]) -> list[Event]:
        seen = []
        for event in self.events():
            seen.append(event)
            if last(event):
                return seen
        raise AssertionError(f"the worker hung up after {seen}")

    def ready(self) -> Ready:
        found = self.events_until(lambda event: isinstance(event, Ready | LoadFailed))[-1]
        assert isinstance(found, Ready), found
        return found

    def hang_up(self) -> None:
        self._stream.close()
        self.connection.close()


@contextmanager
def listening(tmp_path: Path) -> Iterator[tuple[socket.socket, Path]]:
    path = tmp_path / "front.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        yield listener, path


@contextmanager
def worker(tmp_path: Path, config: WorkerConfig) -> Iterator[Peer]:
    with listening(tmp_path) as (listener, path):
        process = subprocess.Popen(worker_command(config, path))
        try:
            connection, _ = listener.accept()
            with connection:
                yield Peer(connection, process)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=211, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_worker_serves_a_model_and_ends_on_sigterm(tmp_path: Path, model_folder: Path) -> None:
    """Progress, facts, mixed requests, a cancelled one, an impossible one, then a clean exit."""
    config = WorkerConfig(model_folder=model_folder, load=LoadOptions(device="cpu", dtype="float32"), threads=1)
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    first, second, endless = prompts([5, 30, 8])
    asked = [request(first, 9), request(second, 9), request(endless, 200), request((4000,), 5)]
    with worker(tmp_path, config) as peer:
        loading = peer.events_until(lambda event: isinstance(event, Ready))
        fractions = [event.fraction for event in loading if isinstance(event, Loading)]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        ready = loading[-1]
        assert isinstance(ready, Ready)
        assert (ready.device, ready.dtype, ready.batching) == ("cpu", "float32", "padded")
        assert ready.memory_bytes > 0
        peer.send(*[Submit(each) for each in asked])
        tokens: dict[int, list[int]] = {}
        over: dict[int, Event] = {}
        for event in peer.events():
            if isinstance(event, Tokens):
                tokens.setdefault(event.id, []).extend(event.token_ids)
            elif isinstance(event, Finished | Failed):
                over[event.id] = event
            if over.keys() == {asked[0].id, asked[1].id, asked[3].id} and asked[2].id in tokens:
                break
        peer.send(Cancel(asked[2].id))
        assert tokens[asked[0].id] == generate_alone(model, first, max_new_tokens=9)
        assert tokens[asked[1].id] == generate_alone(model, second, max_new_tokens=9)
        refused = over[asked[3].id]
        assert isinstance(refused, Failed)
        assert refused.reason == "INVALID_FIELD"
        last = request(first, 2)
        peer.send(Submit(last))
        peer.events_until(lambda event: event == Finished(last.id))
        peer.process.send_signal(signal.SIGTERM)
        assert peer.process.wait(TIMEOUT_S) == 0


def test_a_model_that_cannot_be_loaded_is_reported_and_the_worker_exits(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with worker(tmp_path, WorkerConfig(model_folder=empty)) as peer:
        failure = peer.events_until(lambda event: isinstance(event, LoadFailed))[-1]
        assert isinstance(failure, LoadFailed)
        assert failure.reason in {"CORRUPT_ARTIFACT", "UNSAFE_WEIGHTS", "MODEL_LOAD_FAILED"}
        assert str(tmp_path) not in failure.message
        assert peer.process.wait(TIMEOUT_S) == EXIT_LOAD_FAILED


def test_the_null_engine_answers_at_once_and_ends_sequences(tmp_path: Path) -> None:
    with worker(tmp_path, NULL) as peer:
        assert peer.ready().batching == "null"
        short, ended, cancelled = request((5,), 3), request((5,), 10**9), request((5,), 10**9)
        peer.send(Submit(short), Submit(ended), Submit(cancelled))
        events = peer.events_until(lambda event: event == Finished(short.id))
        found = [event for event in events if isinstance(event, Tokens) and event.id == short.id]
        assert [event.token_ids for event in found] == [[NULL_TOKEN_ID]] * 3
        assert found[-1].finish_reason == "length"
        peer.send(Cancel(cancelled.id), EndSequence(ended.id, 0))
        peer.events_until(lambda event: event == Finished(ended.id))
        peer.send(Shutdown())
        assert peer.process.wait(TIMEOUT_S) == 0


def test_a_worker_goes_when_the_front_hangs_up(tmp_path: Path) -> None:
    with worker(tmp_path, NULL) as peer:
        peer.ready()
        peer.send(Submit(request((5,), 10**9)))
        peer.events_until(lambda event: isinstance(event, Tokens))
        peer.hang_up()
        assert peer.process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize("garbage", [frame(b"\xc1 no command"), b"\xff\xff\xff\xff"])
def test_a_worker_goes_when_the_front_talks_nonsense(tmp_path: Path, garbage: bytes) -> None:
    with worker(tmp_path, NULL) as peer:
        peer.ready()
        peer.connection.sendall(garbage)
        assert peer.process.wait(TIMEOUT_S) == 0


def test_a_front_that_does_not_read_stops_the_engine_not_the_worker(tmp_path: Path) -> None:
    """Endless tokens and nobody reading: memory stays bounded, and the front's end is still noticed."""
    with worker(tmp_path, NULL) as peer:
        peer.ready()
        peer.send(*[Submit(request((5,), 10**9)) for _ in range(50)])
        peer.events_until(lambda event: isinstance(event, Tokens))
        process = psutil.Process(peer.process.pid)
        assert_eventually(lambda: process.cpu_percent(0.2) < 5)
        assert process.memory_info().rss < 500 * 1024 * 1024
        peer.hang_up()
        assert peer.process.wait(TIMEOUT_S) == 0


LAUNCHER = """
import subprocess, sys
process = subprocess.Popen(sys.argv[1:])
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_worker_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    """kill -9 of the parent, with the socket still open in another process."""
    with listening(tmp_path) as (listener, path):
        command = [sys.executable, "-c", LAUNCHER, *worker_command(NULL, path)]
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert launcher.stdout is not None
        process = psutil.Process(int(launcher.stdout.readline()))
        connection, _ = listener.accept()
        with connection, launcher.stdout:
            Peer(connection, launcher).ready()
            launcher.kill()
            launcher.wait()
            assert_eventually(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def assert_eventually(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < limit, "it did not come true in time"
        time.sleep(0.02)


def test_a_configuration_survives_the_command_line() -> None:
    config = WorkerConfig(
        model_folder=Path("/models/a b"), load=LoadOptions(dtype="bfloat16"), max_batch_size=3, threads=2
    )
    assert decode_config(encode_config(config)) == config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_tokens": -1}, "max_batch_tokens"),
        ({"threads": -1}, "threads"),
        ({"engine": "padded"}, "model_folder"),
        ({"engine": "tasks", "tasks": ("fill-mask",)}, "model_folder"),
        ({"engine": "tasks", "model_folder": Path("model")}, "tasks"),
    ],
)
def test_a_bad_configuration_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        WorkerConfig(**{"engine": "null", **fields})


def test_starting_a_worker_needs_no_torch() -> None:
    """The front builds configurations, validates beams and spawns workers without it; so does the null worker."""
    modules = ["worker_config", "worker"]
    parts = ["null", "beam_rules", "checks", "scheduler", "constraints", "anteroom"]
    names = [*modules, *(f"engine.{part}" for part in parts)]
    imports = "; ".join(f"import slipstream_server.inference.{name}" for name in names)
    code = f"{imports}; import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
