"""The worker process: one model, one engine, one socket to the front.

``python -m slipstream_server.inference.worker --socket PATH --config JSON``. The main thread loads the model and then
owns the engine; a reader thread puts decoded commands into the inbox, a writer thread sends the events of finished
steps. It ends with the front: when the socket closes, on Shutdown, on SIGTERM, and by the kernel's hand when the
process that started it dies. Knows nothing of gRPC.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from slipstream_server.errors import InternalError, SlipstreamError
from slipstream_server.inference.engine.core import Engine
from slipstream_server.inference.generation import (
    Cancel,
    EndSequence,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    Submit,
    SubmitTask,
)
from slipstream_server.inference.worker_channel import Channel, Gone, Woken
from slipstream_server.inference.worker_config import WorkerConfig, decode_config
from slipstream_server.logs import configure_logging
from slipstream_server.models.priority import lower_thread, lowered_group

logger = logging.getLogger(__name__)

EXIT_LOAD_FAILED = 3
_LOAD_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


class Worker:
    """The engine's loop: commands in, steps, events out. Main thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: Engine | None = None

    def run(self, config: WorkerConfig) -> int:
        """Load, serve, and return the exit code."""
        try:
            self._load(config)
        except SlipstreamError as error:
            logger.error("the model cannot be loaded: %s", error.message)
            self._channel.send_last([LoadFailed(error.reason, error.message, error.field)])
            return EXIT_LOAD_FAILED
        while self._obey(self._engine_or_fail().wait_s()):
            if (events := self._engine_or_fail().step()) and not self._channel.send(events):
                break
        return 0

    def poll(self) -> None:
        """Carry out the commands that are there; called by an engine in the midst of a long step. Exits on Shutdown."""
        if not self._obey(0.0):
            raise SystemExit(0)

    def _load(self, config: WorkerConfig) -> None:
        if config.engine == "null":
            from slipstream_server.inference.engine.null import NullEngine, null_facts

            self._engine, ready = NullEngine(), null_facts()
        else:
            self._engine, ready = self._assemble(config)
            # Tasks are prepared, and often run, by threads that the engine's starts: they would be bound with it.
            if ready.device == "cpu" and config.engine != "tasks":
                from slipstream_server.inference.engine.cores import bind_team

                bind_team()
        self._channel.send([Loading(1.0, "ready"), ready])
        logger.info("worker ready: %s engine on %s, %s", config.engine, ready.device, ready.dtype)

    def _assemble(self, config: WorkerConfig) -> tuple[Engine, Ready]:
        """Importing, reading and packing happen in a thread that waits for all others, so that a model that loads does
        not slow those down that answer; the engine's own threads come later and are like any.
        """

        def assemble_in_background() -> tuple[Engine, Ready]:
            if config.engine == "tasks":
                from slipstream_server.inference.engine.task_assembly import assemble_tasks

                return assemble_tasks(config, self._report, self._channel.wake)
            from slipstream_server.inference.engine.assembly import assemble

            return assemble(config, self._report, self.poll)

        background = ThreadPoolExecutor(1, "load", initializer=lower_thread)
        try:
            with lowered_group():
                loading = background.submit(assemble_in_background)
                while not loading.done():
                    if not self._obey(_LOAD_POLL_S):
                        raise SystemExit(0)
                return loading.result()
        finally:
            background.shutdown(wait=False)

    def _report(self, fraction: float, stage: str) -> None:
        self._channel.send([Loading(fraction, stage)])

    def _engine_or_fail(self) -> Engine:
        if self._engine is None:
            raise InternalError("no engine is loaded")
        return self._engine

    def _obey(self, wait_s: float | None) -> bool:
        """Wait up to ``wait_s`` (None: for as long as it takes) for a command and carry out all that are there; False
        to end.
        """
        command = self._channel.next_command(wait_s)
        while command is not None:
            if isinstance(command, Gone | Shutdown):
                logger.info("worker ends: %s", "the front is gone" if isinstance(command, Gone) else "told to")
                return False
            if not isinstance(command, Woken):
                self._carry_out(command)
            command = self._channel.next_command(0.0)
        return True

    def _carry_out(self, command: Submit | SubmitTask | Cancel | EndSequence) -> None:
        engine = self._engine_or_fail()
        match command:
            case Submit(request):
                engine.submit(request)
            case SubmitTask(request):
                engine.submit(request)
            case Cancel(request_id):
                engine.cancel(request_id)
            case EndSequence(request_id, index):
                engine.end_sequence(request_id, index)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere the closing socket has to do)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker; returns its exit code."""
    parser = argparse.ArgumentParser(prog="slipstream-worker", description="Serves one model to a front.")
    parser.add_argument("--socket", type=Path, required=True, help="unix socket on which the front listens")
    parser.add_argument("--config", required=True, help="WorkerConfig as JSON")
    options = parser.parse_args(arguments)
    config = decode_config(options.config)
    configure_logging(level=config.log_level, log_format=config.log_format)
    die_with_parent()
    signal.signal(signal.SIGTERM, _terminate)
    # Ctrl-C reaches the whole process group; the front decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel.connect(options.socket)
    try:
        return Worker(channel).run(config)
    finally:
        channel.close()


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 0 if request.code is None else 1
    except BaseException:
        logger.exception("the worker fails")
    finally:
        logging.shutdown()
        # Native threads of the model's libraries may not survive an orderly interpreter shutdown.
        os._exit(code)
