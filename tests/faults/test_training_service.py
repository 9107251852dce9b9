"""The training service killed, stopped and starved of space, with jobs on board; then once whole, with a real model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from tests.conftest import Eventually
from tests.rpc.adapters_kit import refused
from tests.rpc.training_kit import (
    Bench,
    State,
    TrainingClient,
    client_of,
    job_spec,
    new_bench,
    states,
    talk,
)

from slipstream.adapters.v1 import adapter_service_pb2 as adapter_pb2
from slipstream.adapters.v1 import adapter_service_pb2_grpc as adapter_grpc
from slipstream.training.v1 import training_service_pb2 as pb2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WHOLE_WAY = ["VALIDATING", "QUEUED", "STARTING", "RUNNING", "EVALUATING", "SUCCEEDED"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("TRAINING_BENCH", str(tmp_path))
    made = new_bench(tmp_path)
    yield made
    for process in made.runners():
        process.kill()


class Process:
    """A service as a process, and its address."""

    def __init__(self, *command: str, log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "SERVING" in line, log.read_text()[-3000:]
        self.address = line.split()[2]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=30)


@contextmanager
def service(bench: Bench) -> Iterator[Process]:
    place = (str(bench.folder), str(bench.model), str(bench.control))
    process = Process("tests.faults.training_process", *place, log=bench.control / "service.log")
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


@asynccontextmanager
async def client(process: Process) -> AsyncIterator[TrainingClient]:
    async with grpc.aio.insecure_channel(process.address) as channel:
        yield client_of(channel)


def check_whole(events: list[pb2.TrainingJobEvent]) -> None:
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_kill_9_in_mid_job_and_adoption(bench: Bench) -> None:
    bench.say("hold-at", 5)
    with service(bench) as first:
        async with client(first) as calls:
            await calls.upload("talk")
            await calls.create("job", publish="support", alias="live")
            await calls.until_step("job", 5)
        first.kill()
    (runner,) = bench.runners()
    with service(bench) as second:
        async with client(second) as calls:
            assert (await calls.get("job")).state == State.STATE_RUNNING
            assert [process.pid for process in bench.runners()] == [runner.pid]
            bench.say("hold-at", "")
            events = await calls.events("job")
            job = await calls.get("job")
    check_whole(events)
    assert states(events) == [*WHOLE_WAY[:-1], "PUBLISHING", "SUCCEEDED"]
    steps = [event.metrics_logged.step for event in events if event.HasField("metrics_logged")]
    assert steps == list(range(1, 11))
    assert job.attempt_count == 1


@pytest.mark.parametrize("moment", range(6))
async def test_kill_9_again_and_again_launches_once(bench: Bench, moment: int, assert_eventually: Eventually) -> None:
    """Killed while it starts the job's processes, a little later each time: one attempt, one tree, one history."""
    bench.say("hold-at", 8)
    with service(bench) as first:
        async with client(first) as calls:
            await calls.upload("talk")
            await calls.create("job")
            async with asyncio.timeout(20):
                while not (bench.folder / "jobs" / "job" / "recipe.json").exists():
                    await asyncio.sleep(0)
        await asyncio.sleep(0.01 * moment)
        first.kill()
    with service(bench) as second:
        async with client(second) as calls:
            await calls.until_step("job", 8)
            assert len(bench.runners()) == 1
            second.kill()
    with service(bench) as third:
        async with client(third) as calls:
            bench.say("hold-at", "")
            events = await calls.events("job")
            job = await calls.get("job")
    check_whole(events)
    assert (states(events), job.attempt_count) == (WHOLE_WAY, 1)
    await assert_eventually(lambda: bench.runners() == [])


async def test_kill_9_in_the_middle_of_publishing_publishes_once(bench: Bench, assert_eventually: Eventually) -> None:
    bench.say("registry-hold", 1)
    versions = bench.control / "versions"
    with service(bench) as first:
        async with client(first) as calls:
            await calls.upload("talk")
            await calls.create("job", publish="support", alias="live")
            await assert_eventually(lambda: versions.exists() and len(list(versions.iterdir())) == 1, timeout_s=30)
        first.kill()
    (bench.control / "registry-hold").unlink()
    with service(bench) as second:
        async with client(second) as calls:
            job = await calls.wait_for_end("job")
    assert job.state == State.STATE_SUCCEEDED
    assert len(list(versions.iterdir())) == 1


async def test_service_and_trainer_killed_together_resume_from_the_checkpoint(bench: Bench) -> None:
    """As when a container dies as a whole."""
    bench.say("hold-at", 7)
    with service(bench) as first:
        async with client(first) as calls:
            await calls.upload("talk")
            await calls.create("job", checkpoint_interval=3)
            await calls.until_step("job", 7)
        first.kill()
    for process in bench.runners():
        process.kill()
    bench.say("hold-at", "")
    with service(bench) as second:
        async with client(second) as calls:
            events = await calls.events("job")
    check_whole(events)
    started = [event.attempt_started.resumed_step for event in events if event.HasField("attempt_started")]
    assert (started, states(events)[-1]) == ([0, 6], "SUCCEEDED")


async def test_a_stopped_service_that_wakes_is_fenced_out(bench: Bench) -> None:
    bench.say("hold-at", 5)
    with service(bench) as old:
        async with client(old) as calls:
            await calls.upload("talk")
            await calls.create("job")
            await calls.until_step("job", 5)
        old.process.send_signal(signal.SIGSTOP)
        with service(bench) as new:
            async with client(new) as calls:
                bench.say("hold-at", "")
                events = await calls.events("job")
                old.process.send_signal(signal.SIGCONT)
                assert old.process.wait(timeout=30) == 1
                assert (await calls.get("job")).last_sequence == len(events)
    check_whole(events)
    assert states(events) == WHOLE_WAY
    assert "FENCED" in (bench.control / "service.log").read_text().upper()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Callable[[], None]:
    """Leave no free byte below ``folder``; what is returned makes room again."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return ballast.unlink


async def test_a_full_disk_refuses_writes_answers_reads_and_recovers(
    bench: Bench, small_disk: Path, tmp_path: Path
) -> None:
    starved = Bench(folder=small_disk, model=bench.model, control=bench.control)
    starved.say("hold-at", 5)
    with service(starved) as process:
        async with client(process) as calls:
            await calls.upload("talk")
            await calls.create("job", retries=10, checkpoint_interval=3)
            await calls.until_step("job", 5)
            before = await calls.get("job")
            make_room = fill(small_disk)
            upload = calls.upload("more", *talk(200))
            assert (await refused(upload))[0] == "RESOURCE_EXHAUSTED"
            assert (await refused(calls.create("another")))[0] == "RESOURCE_EXHAUSTED"
            assert (await calls.get("job")).last_sequence == before.last_sequence
            starved.say("hold-at", "")  # the runner writes on, and finds no room either
            async with asyncio.timeout(20):
                while starved.runners():
                    await asyncio.sleep(0.05)
            assert (await calls.get("job")).state == State.STATE_RUNNING
            make_room()
            job = await calls.wait_for_end("job")
            events = await calls.events("job")
            assert (await calls.upload("more", *talk(200))).name == "datasets/more"
    assert job.state == State.STATE_SUCCEEDED
    check_whole(events)


# With the real runner


def save_real_model(folder: Path) -> Path:
    """A Llama of two layers over bytes."""
    script = "import sys; from pathlib import Path; from tests.faults.tiny_llama import save; save(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    return folder


async def test_a_real_job_survives_kills_of_service_and_trainer_and_is_published(
    tmp_path: Path, assert_eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TRAINING_BENCH", str(tmp_path))
    model = save_real_model(tmp_path / "model")
    common = ("--data-dir", str(tmp_path / "data"), "--base-port", "0")
    adapters = Process("slipstream_server.cli", "adapters", *common, log=tmp_path / "adapters.log")
    arguments = ("slipstream_server.cli", "training", *common, "--adapters-address", adapters.address)
    arguments += ("--set", f"inference.models=tiny={model}")
    training = Process(*arguments, log=tmp_path / "training.log")
    try:
        async with client(training) as calls:
            await calls.upload("talk", *talk(40))
            spec = job_spec(max_steps=400, checkpoint_interval=20, publish="support", alias="live")
            spec.hyperparameters.learning_rate, spec.hyperparameters.batch_size = 1e-2, 4
            await calls.jobs.CreateTrainingJob(pb2.CreateTrainingJobRequest(training_job_id="job", spec=spec))
            await calls.until_step("job", 25, timeout_s=240)
        training.kill()
        training = Process(*arguments, log=tmp_path / "training.log")
        async with client(training) as calls:
            await calls.until_step("job", 60, timeout_s=120)
            kill_trainer()
            events = await calls.events("job", timeout_s=400)
            job = await calls.get("job")
        await check_published(adapters, job)
    finally:
        for process in (training, adapters):
            process.process.kill()
            process.process.wait()
    check_whole(events)
    resumed = [event.attempt_started.resumed_step for event in events if event.HasField("attempt_started")]
    assert resumed[0] == 0
    assert len(resumed) == 2
    assert resumed[1] >= 40
    assert states(events)[-2:] == ["PUBLISHING", "SUCCEEDED"]
    assert job.result.metrics["eval_loss"] < 0.8 * job.result.baseline_metrics["eval_loss"]
    await assert_eventually(lambda: not [process for process in psutil.process_iter() if is_runner(process)])


def is_runner(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
        return process.environ().get("TRAINING_BENCH") == os.environ["TRAINING_BENCH"] and (
            "slipstream_server.training.run" in command
        )
    except (psutil.Error, OSError):
        return False


def kill_trainer() -> None:
    """SIGKILL for the process that trains, not for its launcher."""
    runners = [process for process in psutil.process_iter() if is_runner(process)]
    trainer = next(process for process in runners if "accelerate.commands.launch" not in process.cmdline())
    trainer.kill()


async def check_published(adapters: Process, job: pb2.TrainingJob) -> None:
    async with grpc.aio.insecure_channel(adapters.address) as channel:
        stub = adapter_grpc.AdapterServiceStub(channel)
        version = await stub.GetAdapterVersion(adapter_pb2.GetAdapterVersionRequest(name="support@live"))
    assert version.name == job.result.adapter_version == "adapters/support/versions/v1"
    assert version.base_model == "models/tiny"
    assert version.provenance.training_job == "trainingJobs/job"
    assert version.provenance.dataset_digest == job.result.dataset_digest
    assert version.metrics["eval_loss"] == pytest.approx(job.result.metrics["eval_loss"])
    assert version.lora.rank == 8
