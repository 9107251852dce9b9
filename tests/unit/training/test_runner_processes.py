"""The runner as processes of its own: killed without warning, told to stop while it loads, and two at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slipstream_server.training.checkpoints import list_checkpoint_folders
from slipstream_server.training.events import Checkpoint, Evaluation, Failed, Started, Stopped
from slipstream_server.training.failures import ExitStatus
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.result import TrainingResult, read_result

from .conftest import MakeJob, RunHere, events, start_runner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {"max_steps": 300, "checkpoint_interval_steps": 10, "logging_interval_steps": 10}
TWO_PROCESSES = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def wait_until(condition: Callable[[], bool], runner: subprocess.Popen[bytes], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert runner.poll() is None, "the runner ended before it came to that"
        assert time.monotonic() < deadline, "the runner did not come to that in time"
        time.sleep(0.002)


def finish(job: JobFolder, attempt: int, *launcher: str) -> TrainingResult:
    runner = start_runner(job, attempt, *launcher)
    assert runner.wait(timeout=400) == 0, (job.path / f"runner-{attempt}.log").read_text()[-3000:]
    result = read_result(job.result)
    assert result is not None
    return result


def test_killed_runner_goes_on_from_its_last_complete_checkpoint(make_job: MakeJob) -> None:
    whole, killed = make_job("whole", **SETTINGS), make_job("killed", **SETTINGS)
    expected = finish(whole, 1)
    runner = start_runner(killed, 1)
    try:
        wait_until(lambda: sum(isinstance(event, Checkpoint) for event in events(killed)) >= 3, runner)
    finally:
        os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
    assert not killed.result.exists()
    found = finish(killed, 2)
    started = events(killed, 2)[0]
    assert isinstance(started, Started)
    assert 30 <= started.resumed_from_step < 300
    assert found.files == expected.files
    assert found.train_loss == pytest.approx(expected.train_loss, abs=1e-6)


def test_signal_before_training_ends_the_runner_at_once(make_job: MakeJob) -> None:
    job = make_job(**SETTINGS)
    runner = start_runner(job, 1)
    wait_until(lambda: job.events(1).exists() and (job.path / "lock").exists(), runner)
    runner.terminate()
    assert runner.wait(timeout=120) == ExitStatus.STOPPED
    (last,) = events(job)
    assert last == Stopped(step=0, checkpoint="", time_s=last.time_s)


def test_two_processes_train_one_job(make_job: MakeJob) -> None:
    """Twice two rows a step are the four rows a step of one process: the same data in another order of sums."""
    alone = make_job("alone", max_steps=10, batch_size_per_device=4)
    together = make_job("together", max_steps=10, batch_size_per_device=2)
    for job in (alone, together):
        document = json.loads(job.recipe.read_bytes())
        document["adapter"]["dropout"] = 0.0
        document["world_size"] = 2 if job is together else 1
        job.recipe.write_text(json.dumps(document))
    expected, found = finish(alone, 1), finish(together, 1, *TWO_PROCESSES)
    started = events(together)[0]
    assert isinstance(started, Started)
    assert started.world_size == 2
    assert found.eval_loss_before == pytest.approx(expected.eval_loss_before, abs=1e-5)
    assert found.num_tokens == expected.num_tokens
    evaluations = [event for event in events(together) if isinstance(event, Evaluation)]
    assert len(evaluations) == 2
    assert found.eval_loss_after == pytest.approx(expected.eval_loss_after, rel=0.05)


def test_launcher_that_starts_too_few_is_found_out(make_job: MakeJob) -> None:
    job = make_job(max_steps=1)
    document = json.loads(job.recipe.read_bytes())
    job.recipe.write_text(json.dumps({**document, "world_size": 2}))
    runner = start_runner(job, 1, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    assert runner.wait(timeout=240) != 0
    (failure,) = events(job)
    assert isinstance(failure, Failed)
    assert "expects 2 processes, the launcher started 1" in failure.message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this process lacks")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_disk_that_is_really_full_is_told_and_training_goes_on_with_space(
    make_job: MakeJob, run_here: RunHere, small_disk: Path
) -> None:
    """Two checkpoints of a quarter mebibyte fit beside the filling, a third one does not."""
    recipe = make_job(max_steps=40, checkpoint_interval_steps=5).recipe.read_bytes()
    job = JobFolder(small_disk / "job")
    job.path.mkdir()
    job.recipe.write_bytes(recipe)
    filling = small_disk / "filling"
    filling.write_bytes(b"x" * 330_000)
    assert run_here(job) == ExitStatus.STORAGE_FULL
    failure = events(job)[-1]
    assert isinstance(failure, Failed)
    assert failure.reason == "STORAGE_FULL"
    assert [path.name for path in list_checkpoint_folders(job.checkpoints)] == ["checkpoint-5", "checkpoint-10"]
    filling.unlink()
    assert run_here(job, 2) == ExitStatus.FINISHED
    started = events(job, 2)[0]
    assert isinstance(started, Started)
    assert started.resumed_from_step == 10


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
