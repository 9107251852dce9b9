"""Training jobs over real gRPC: run in their order, ended, stopped, resumed, and watched."""

from __future__ import annotations

import asyncio
import random

from google.rpc import error_details_pb2
from tests.rpc.adapters_kit import refused
from tests.rpc.training_kit import (
    GIB,
    INVALID,
    WHOLE_WAY,
    Bench,
    State,
    TrainingClient,
    job_spec,
    states,
)

from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream_server.storage.device_ledger import DeviceLedger


async def test_a_job_goes_its_whole_way(service: TrainingClient) -> None:
    created = await service.create("first", max_steps=10, checkpoint_interval=4)
    assert created.state == State.STATE_VALIDATING
    events = await service.events("first")
    assert states(events) == WHOLE_WAY
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert {event.attempt for event in events} == {0, 1}
    steps = [event.metrics_logged.step for event in events if event.HasField("metrics_logged")]
    assert steps == list(range(1, 11))
    job = await service.get("first")
    assert (job.state, job.attempt_count, job.last_sequence) == (State.STATE_SUCCEEDED, 1, len(events))
    assert job.result.metrics["eval_loss"] == 1.0
    assert job.result.baseline_metrics["eval_loss"] == 2.0
    assert (job.result.step_count, job.result.trained_token_count) == (10, 100)
    assert job.create_time.ToNanoseconds() <= job.start_time.ToNanoseconds() <= job.end_time.ToNanoseconds()
    checkpoints = await service.jobs.ListCheckpoints(pb2.ListCheckpointsRequest(parent="first"))
    assert [each.step for each in checkpoints.checkpoints] == [10, 8]
    saved = [event.checkpoint_saved for event in events if event.HasField("checkpoint_saved")]
    assert list(saved[2].deleted_checkpoints) == ["trainingJobs/first/checkpoints/4"]


# The queue


async def test_jobs_start_by_priority_and_then_by_age(service: TrainingClient, bench: Bench) -> None:
    bench.say("hold-at", 1)
    for name in ("a", "b", "c", "d"):
        await service.create(name)
        await service.until_step(name, 1)
    await service.create("low", priority=-1)
    await service.create("first")
    await service.create("high", priority=5)
    for name in ("low", "first", "high"):
        await service.until(name, State.STATE_QUEUED)
    positions = {name: (await service.get(name)).queue_position for name in ("low", "first", "high")}
    assert positions == {"high": 1, "first": 2, "low": 3}
    async with asyncio.timeout(10):
        while not (waiting := await service.get("high")).state_message:
            await asyncio.sleep(0.02)
    assert "4 jobs may run at once" in waiting.state_message
    bench.say("hold-at", "")
    began = [(await service.until(name, State.STATE_SUCCEEDED)).start_time for name in ("high", "first", "low")]
    assert [each.ToNanoseconds() for each in began] == sorted(each.ToNanoseconds() for each in began)


async def test_a_job_waits_for_memory_that_others_hold(service: TrainingClient, bench: Bench) -> None:
    ledger = DeviceLedger(bench.folder)
    ledger.reserve("inference", {"cpu": 60 * GIB}, bench.capacity_bytes)
    await service.create("job", resources=pb2.TrainingResources(memory_bytes=10 * GIB))
    await service.until("job", State.STATE_QUEUED)
    async with asyncio.timeout(10):
        while not (job := await service.get("job")).state_message:
            await asyncio.sleep(0.02)
    assert job.state_message == "waiting for memory: 10.0 GiB on cpu are needed, 4.0 GiB are left"
    ledger.release("inference")
    await service.until("job", State.STATE_SUCCEEDED)
    assert ledger.reserved_bytes("cpu") == 0


# Ended, stopped, resumed


async def test_cancel_leaves_no_process_and_keeps_the_checkpoint(service: TrainingClient, bench: Bench) -> None:
    bench.say("child", 1)
    bench.say("hold-at", 5)
    await service.create("job")
    await service.until_step("job", 5)
    assert len(bench.runners()) == 2
    job = await service.cancel("job")
    assert job.state == State.STATE_CANCELLED
    assert bench.runners() == []
    checkpoints = await service.jobs.ListCheckpoints(pb2.ListCheckpointsRequest(parent="job"))
    assert 6 in [each.step for each in checkpoints.checkpoints]  # written when it was told to end
    assert (bench.folder / "jobs" / "job" / "checkpoints" / "checkpoint-6" / "complete.json").exists()
    assert (await service.cancel("job")).state == State.STATE_CANCELLED


async def test_cancel_kills_what_does_not_listen(service: TrainingClient, bench: Bench) -> None:
    bench.say("stubborn", 1)
    bench.say("hold-at", 2)
    await service.create("job")
    await service.until_step("job", 2)
    job = await service.cancel("job", grace_s=0)
    assert job.state == State.STATE_CANCELLED
    assert bench.runners() == []


async def test_cancel_of_a_waiting_job_and_of_a_finished_one(service: TrainingClient, bench: Bench) -> None:
    DeviceLedger(bench.folder).reserve("inference", {"cpu": 64 * GIB}, bench.capacity_bytes)
    await service.create("waiting")
    await service.until("waiting", State.STATE_QUEUED)
    assert (await service.cancel("waiting")).state == State.STATE_CANCELLED
    DeviceLedger(bench.folder).release("inference")
    await service.create("done")
    await service.until("done", State.STATE_SUCCEEDED)
    assert await refused(service.cancel("done")) == ("FAILED_PRECONDITION", "WRONG_STATE")
    assert await refused(service.cancel("none")) == ("NOT_FOUND", "JOB_NOT_FOUND")


async def test_pause_and_resume_go_on_where_it_stopped(service: TrainingClient, bench: Bench) -> None:
    bench.say("hold-at", 5)
    await service.create("job")
    await service.until_step("job", 5)
    await service.jobs.PauseTrainingJob(pb2.PauseTrainingJobRequest(name="job"))
    await service.until("job", State.STATE_PAUSED)
    assert bench.runners() == []
    assert await refused(service.jobs.PauseTrainingJob(pb2.PauseTrainingJobRequest(name="job"))) == (
        "FAILED_PRECONDITION",
        "WRONG_STATE",
    )
    bench.say("hold-at", "")
    await service.jobs.ResumeTrainingJob(pb2.ResumeTrainingJobRequest(name="job"))
    events = await service.events("job")
    started = [event.attempt_started.resumed_step for event in events if event.HasField("attempt_started")]
    assert started == [0, 6]
    assert states(events)[3:] == ["RUNNING", "PAUSED", "QUEUED", *WHOLE_WAY[2:]]


async def test_resume_from_an_older_checkpoint_forgets_the_later_ones(service: TrainingClient, bench: Bench) -> None:
    bench.say("hold-at", 9)
    await service.create("job", checkpoint_interval=4)
    await service.until_step("job", 9)
    await service.cancel("job")
    resume = service.jobs.ResumeTrainingJob
    unknown = resume(pb2.ResumeTrainingJobRequest(name="job", checkpoint="5"))
    assert await refused(unknown) == ("NOT_FOUND", "CHECKPOINT_NOT_FOUND")
    bench.say("hold-at", "")
    await resume(pb2.ResumeTrainingJobRequest(name="job", checkpoint="trainingJobs/job/checkpoints/8"))
    job = await service.until("job", State.STATE_SUCCEEDED)
    events = await service.events("job")
    started = [event.attempt_started.resumed_step for event in events if event.HasField("attempt_started")]
    assert (started, job.attempt_count) == ([0, 8], 2)


async def test_a_killed_trainer_goes_on_from_its_last_complete_checkpoint(
    service: TrainingClient, bench: Bench
) -> None:
    bench.say("die-below", 2)
    bench.say("die-at", 7)
    await service.create("job", checkpoint_interval=3)
    events = await service.events("job")
    (failed,) = (event.attempt_failed for event in events if event.HasField("attempt_failed"))
    assert failed.will_retry
    started = [event.attempt_started.resumed_step for event in events if event.HasField("attempt_started")]
    assert started == [0, 6]
    assert states(events)[-1] == "SUCCEEDED"
    assert (await service.get("job")).attempt_count == 2
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_a_trainer_that_always_dies_fails_with_a_reason(service: TrainingClient, bench: Bench) -> None:
    bench.say("die-at", 2)
    await service.create("job", retries=1)
    job = await service.until("job", State.STATE_FAILED)
    info = error_details_pb2.ErrorInfo()
    job.error.details[0].Unpack(info)
    assert (info.reason, job.attempt_count) == ("WORKER_DIED", 2)
    resume = service.jobs.ResumeTrainingJob(pb2.ResumeTrainingJobRequest(name="job"))
    assert await refused(resume) == ("FAILED_PRECONDITION", "WRONG_STATE")  # no checkpoint


async def test_a_mistake_is_not_tried_again(service: TrainingClient, bench: Bench) -> None:
    bench.say("fail", "INVALID_FIELD hyperparameters.learning_rate: the loss is not a finite number at step 3")
    await service.create("job")
    job = await service.until("job", State.STATE_FAILED)
    assert job.attempt_count == 1
    assert "not a finite number" in job.error.message


async def test_retry_from_the_beginning_where_the_policy_says_so(service: TrainingClient, bench: Bench) -> None:
    bench.say("die-below", 2)
    bench.say("die-at", 7)
    spec = job_spec(checkpoint_interval=3)
    spec.retry_policy.resume_from_checkpoint = False
    await service.jobs.CreateTrainingJob(pb2.CreateTrainingJobRequest(training_job_id="job", spec=spec))
    events = await service.events("job")
    started = [event.attempt_started.resumed_step for event in events if event.HasField("attempt_started")]
    assert started == [0, 0]


async def test_delete_takes_an_ended_job_with_its_files_and_events(service: TrainingClient, bench: Bench) -> None:
    bench.say("hold-at", 1)
    await service.create("job")
    await service.until_step("job", 1)
    delete = pb2.DeleteTrainingJobRequest(name="job")
    assert await refused(service.jobs.DeleteTrainingJob(delete)) == ("FAILED_PRECONDITION", "WRONG_STATE")
    await service.cancel("job")
    await service.jobs.DeleteTrainingJob(delete)
    assert await refused(service.get("job")) == ("NOT_FOUND", "JOB_NOT_FOUND")
    assert not (bench.folder / "jobs" / "job").exists()
    bench.say("hold-at", "")
    await service.create("job")
    assert (await service.events("job"))[0].sequence == 1


# Watching


async def test_twenty_watchers_that_reconnect_at_random_miss_and_repeat_nothing(
    service: TrainingClient, bench: Bench
) -> None:
    bench.say("hold-at", 3)
    await service.create("job", max_steps=120, checkpoint_interval=10)
    draws = random.Random(7)

    async def watch(seed: int) -> list[int]:
        own, seen = random.Random(seed), [0]
        while True:
            request = pb2.WatchTrainingJobRequest(name="job", after_sequence=seen[-1])
            call = service.jobs.WatchTrainingJob(request, timeout=60)
            left = own.randint(1, 4)
            async for response in call:
                seen += [event.sequence for event in response.events]
                left -= 1
                if left == 0:
                    call.cancel()
                    break
            else:
                return seen[1:]

    async def release() -> None:
        for step in range(4, 121, draws.randint(5, 9)):
            bench.say("hold-at", step)
            await service.until_step("job", step)
        bench.say("hold-at", "")

    seen = (await asyncio.gather(release(), *(watch(seed) for seed in range(20))))[1:]
    last = (await service.get("job")).last_sequence
    assert last > 120
    assert all(each == list(range(1, last + 1)) for each in seen)


async def test_watching_from_the_future_or_of_nothing_is_refused(service: TrainingClient) -> None:
    await service.create("job")
    await service.until("job", State.STATE_SUCCEEDED)
    last = (await service.get("job")).last_sequence
    assert await service.events("job", after=last) == []
    assert await refused(service.events("job", after=last + 1)) == INVALID
    assert await refused(service.events("job", after=-1)) == INVALID
    assert await refused(service.events("none")) == ("NOT_FOUND", "JOB_NOT_FOUND")
