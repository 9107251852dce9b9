"""The processes of one attempt: started so that they outlive this service, found again, told to end, ended.

Every process of the tree has the attempt's mark in its environment. That is how they are found: launchers put workers
into sessions of their own, and orphans lose their parents, but nobody loses the environment it was started with.

    launch        before it, the mark is stored; after it, pid and start
    found again   by pid and start, or by the mark where the service died in between
    ended         SIGTERM to all, a grace, SIGKILL to all, and a look that none is left

Blocking (starting a process, waiting for ends); run it in a thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from slipstream_server.errors import InternalError
from slipstream_server.storage.process_identity import ProcessIdentity

logger = logging.getLogger(__name__)

MARK = "SLIPSTREAM_TRAINING_ATTEMPT"
_LOOK_S = 0.05
_KILL_S = 20.0
# The runner needs none of these, and what it starts needs them even less.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOrder:
    """What to start. ``visible_devices``: the GPUs it may use, by number; empty: none."""

    mark: str
    recipe: Path
    folder: Path
    attempt: int
    num_processes: int
    visible_devices: tuple[int, ...]
    log_file: Path


def runner_command(order: LaunchOrder) -> list[str]:
    """``accelerate launch`` of the runner. Accelerate's ``--cpu`` starts one process whatever number it is told."""
    several = ["--multi_gpu"] if order.num_processes > 1 else ([] if order.visible_devices else ["--cpu"])
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", *several),
        *("--num_processes", str(order.num_processes), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("-m", "slipstream_server.training.run"),
        *("--recipe", str(order.recipe), "--attempt", str(order.attempt), "--folder", str(order.folder)),
    ]


def launch(order: LaunchOrder, command: Sequence[str]) -> ProcessIdentity:
    """Start ``command`` in a session of its own; raises OSError."""
    descriptor = os.open(order.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd=order.folder,
            env=_environment(order),
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    _children[process.pid] = process
    # A child that has ended at once is still there, unreaped, under its number.
    return ProcessIdentity.of(process.pid) or ProcessIdentity(process.pid, "ended")


def find_root(mark: str) -> ProcessIdentity | None:
    """The first process of the tree with ``mark``: the one whose parent has it not."""
    tree = {process.pid: process for process in _marked(mark)}
    for process in tree.values():
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in tree:
                return ProcessIdentity.of(process.pid)
    return None


def is_running(root: ProcessIdentity) -> bool:
    """Whether the tree's first process lives; reaps it where it has ended and was this service's child."""
    if (child := _children.get(root.pid)) is not None and child.poll() is not None:
        del _children[root.pid]
        return False
    return root.is_alive()


def end_tree(mark: str, grace_s: float) -> None:
    """Return when no process of the tree is left: SIGTERM, after ``grace_s`` SIGKILL.

    Raises InternalError where even that leaves one.
    """
    _signal(_marked(mark), signal.SIGTERM)
    if not _wait_for_none(mark, grace_s):
        logger.warning("an attempt's processes outlived their grace of %g s and are killed", grace_s)
        kill_tree(mark)


def kill_tree(mark: str) -> None:
    """SIGKILL to every process of the tree; return when none is left. Raises InternalError where one stays."""
    deadline = time.monotonic() + _KILL_S
    while remaining := _marked(mark):
        # Again and again: what was being started between two looks must go too.
        _signal(remaining, signal.SIGKILL)
        if _wait_for_none(mark, 1.0):
            return
        if time.monotonic() > deadline:
            raise InternalError(f"{len(remaining)} processes of the job cannot be ended")


def _wait_for_none(mark: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while _marked(mark):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_S)
    return True


# Started by this process, and to be reaped by it.
_children: dict[int, subprocess.Popen[bytes]] = {}


def _marked(mark: str) -> list[psutil.Process]:
    """The living processes of the tree."""
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            _children.pop(pid, None)
    return [process for process in psutil.process_iter() if _has_mark(process, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _environment(order: LaunchOrder) -> Mapping[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_") and name not in _SECRETS
    }
    devices = ",".join(map(str, order.visible_devices))
    use_cpu = {} if order.visible_devices else {"ACCELERATE_USE_CPU": "true"}
    return {**kept, **use_cpu, MARK: order.mark, "CUDA_VISIBLE_DEVICES": devices, "PYTHONUNBUFFERED": "1"}
