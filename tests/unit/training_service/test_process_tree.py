"""The process tree of an attempt: found by its mark, and ended to the last process, whatever it does against that."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slipstream_server.training import process_tree
from slipstream_server.training.process_tree import LaunchOrder

# A parent with a child in a session of its own, which has a child that ignores SIGTERM; then it obeys its argument.
TREE = """
import signal, subprocess, sys, time
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
middle = ("import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', " + repr(stubborn) + "],"
          " stdout=subprocess.PIPE); p.stdout.readline(); print(1, flush=True); time.sleep(600)")
child = subprocess.Popen([sys.executable, "-c", middle], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
open("ready", "w").close()
if sys.argv[1] == "leave":
    sys.exit(0)
time.sleep(600)
"""


@pytest.fixture
def order(tmp_path: Path) -> Iterator[LaunchOrder]:
    made = LaunchOrder(
        mark=secrets.token_hex(16),
        recipe=tmp_path / "recipe.json",
        folder=tmp_path,
        attempt=1,
        num_processes=1,
        visible_devices=(),
        log_file=tmp_path / "runner-1.log",
    )
    yield made
    process_tree.kill_tree(made.mark)


def start(order: LaunchOrder, what: str) -> process_tree.ProcessIdentity:
    root = process_tree.launch(order, [sys.executable, "-c", TREE, what])
    wait_for(lambda: (order.folder / "ready").exists())
    return root


def wait_for(condition, timeout_s: float = 20.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def marked(mark: str) -> list[psutil.Process]:
    """A second look, by the files of the kernel alone."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(psutil.Process(int(folder.name)))
        except (OSError, psutil.Error):
            continue
    return found


def test_every_process_is_ended(order: LaunchOrder) -> None:
    root = start(order, "stay")
    assert len(marked(order.mark)) == 3
    assert process_tree.is_running(root)
    process_tree.end_tree(order.mark, grace_s=0.2)
    assert marked(order.mark) == []
    assert not process_tree.is_running(root)


def test_orphans_are_ended_too(order: LaunchOrder) -> None:
    root = start(order, "leave")
    wait_for(lambda: not process_tree.is_running(root))
    assert len(marked(order.mark)) == 2
    process_tree.end_tree(order.mark, grace_s=0.0)
    assert marked(order.mark) == []


def test_those_that_listen_are_not_killed(order: LaunchOrder) -> None:
    script = (
        "import signal, sys, time\n"
        "def leave(*_):\n    time.sleep(0.3); open('left', 'w').close(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\nopen('ready', 'w').close()\ntime.sleep(600)"
    )
    process_tree.launch(order, [sys.executable, "-c", script])
    wait_for(lambda: (order.folder / "ready").exists())
    process_tree.end_tree(order.mark, grace_s=20.0)
    assert (order.folder / "left").exists()


def test_the_first_process_is_found_by_the_mark(order: LaunchOrder) -> None:
    assert process_tree.find_root(order.mark) is None
    root = start(order, "stay")
    assert process_tree.find_root(order.mark) == root
    assert process_tree.find_root("another mark") is None


def test_what_has_ended_at_once_is_not_running(order: LaunchOrder) -> None:
    root = process_tree.launch(order, [sys.executable, "-c", "print('a word')"])
    wait_for(lambda: not process_tree.is_running(root))
    assert order.log_file.read_text() == "a word\n"


def test_secrets_and_settings_stay_outside(order: LaunchOrder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("SLIPSTREAM_TOKEN_FILE", "somewhere")
    monkeypatch.setenv("KEPT", "yes")
    root = process_tree.launch(order, [sys.executable, "-c", "import os; print(sorted(os.environ))"])
    wait_for(lambda: not process_tree.is_running(root))
    told = order.log_file.read_text()
    assert "KEPT" in told
    assert "HF_TOKEN" not in told
    assert "SLIPSTREAM_TOKEN_FILE" not in told


def test_launcher_arguments_are_ones_accelerate_knows(order: LaunchOrder) -> None:
    command = process_tree.runner_command(order)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert "--cpu" in command
    assert command[command.index("-m", 3) + 1] == "slipstream_server.training.run"


def test_a_command_that_does_not_exist_is_an_error(order: LaunchOrder) -> None:
    with pytest.raises(OSError, match="No such file"):
        process_tree.launch(order, ["/no/such/program"])
