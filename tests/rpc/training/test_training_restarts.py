"""Training services that come and go: the next one adopts jobs and publications; owners are kept apart."""

from __future__ import annotations

import asyncio

from tests.conftest import Eventually
from tests.rpc.adapters_kit import refused
from tests.rpc.training_kit import (
    WHOLE_WAY,
    Bench,
    State,
    job_spec,
    jsonl,
    states,
    talk,
    training_service,
    upload_messages,
)

from slipstream.training.v1 import training_service_pb2 as pb2


async def test_a_stopped_service_leaves_its_jobs_and_the_next_one_adopts_them(
    bench: Bench, assert_eventually: Eventually
) -> None:
    bench.say("hold-at", 5)
    async with training_service(bench) as first:
        await first.upload("talk")
        await first.create("job")
        await first.until_step("job", 5)
        before = await first.get("job")
    (runner,) = bench.runners()
    async with training_service(bench) as second:
        bench.say("hold-at", "")
        events = await second.events("job")
        job = await second.get("job")
    assert not runner.is_running()
    assert (job.state, job.attempt_count) == (State.STATE_SUCCEEDED, 1)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert states(events) == WHOLE_WAY
    assert job.last_sequence > before.last_sequence


async def test_a_job_that_finished_meanwhile_is_found_finished(bench: Bench, assert_eventually: Eventually) -> None:
    bench.say("hold-at", 5)
    async with training_service(bench) as first:
        await first.upload("talk")
        await first.create("job", publish="support")
        await first.until_step("job", 5)
    bench.say("hold-at", "")
    await assert_eventually(lambda: bench.runners() == [])
    async with training_service(bench) as second:
        events = await second.events("job")
    assert states(events) == [*WHOLE_WAY[:-1], "PUBLISHING", "SUCCEEDED"]
    assert len(bench.registry.versions) == 1


async def test_a_restart_in_the_middle_of_publishing_publishes_once(bench: Bench) -> None:
    bench.registry.gate.clear()
    async with training_service(bench) as first:
        await first.upload("talk")
        await first.create("job", publish="support", alias="live")
        await first.until("job", State.STATE_PUBLISHING)
        async with asyncio.timeout(10):
            while not bench.registry.versions:
                await asyncio.sleep(0.01)
    bench.registry.gate.set()
    async with training_service(bench) as second:
        job = await second.until("job", State.STATE_SUCCEEDED)
        again = await second.create("again", publish="support")
        assert again.name
        await second.until("again", State.STATE_SUCCEEDED)
    assert job.result.adapter_version == "adapters/support/versions/v1"
    assert len(bench.registry.versions) == 2


async def test_a_newer_service_fences_the_older_one_out(bench: Bench) -> None:
    bench.say("hold-at", 5)
    async with training_service(bench) as old:
        await old.upload("talk")
        await old.create("job")
        await old.until_step("job", 5)
        async with training_service(bench) as new:
            bench.say("hold-at", "")
            events = await new.events("job")
            assert states(events) == WHOLE_WAY
            # Its next write is refused, and it stops loudly.
            async with asyncio.timeout(10):
                assert await asyncio.shield(old.serving) == 1
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_what_belongs_to_another_owner_does_not_exist(bench: Bench) -> None:
    tokens = bench.folder / "tokens"
    tokens.write_text("token-of-ann ann\ntoken-of-bob bob\n")
    tokens.chmod(0o600)
    ann, bob = ((("authorization", f"Bearer token-of-{name}"),) for name in ("ann", "bob"))
    async with training_service(bench, token_file=tokens) as service:
        messages = iter(upload_messages("talk", {"train.jsonl": jsonl(talk())}))
        await service.datasets.UploadDataset(messages, metadata=ann)
        create = pb2.CreateTrainingJobRequest(training_job_id="job", spec=job_spec())
        stolen = service.jobs.CreateTrainingJob(create, metadata=bob)
        assert await refused(stolen) == ("NOT_FOUND", "DATASET_NOT_FOUND")
        job = await service.jobs.CreateTrainingJob(create, metadata=ann)
        assert job.owner == "ann"
        cancel = pb2.CancelTrainingJobRequest(name="job")
        assert await refused(service.jobs.CancelTrainingJob(cancel, metadata=bob)) == ("NOT_FOUND", "JOB_NOT_FOUND")
        seen = await service.jobs.ListTrainingJobs(pb2.ListTrainingJobsRequest(), metadata=bob)
        assert not seen.training_jobs
        assert (await service.jobs.CancelTrainingJob(cancel, metadata=ann)).name == "trainingJobs/job"
