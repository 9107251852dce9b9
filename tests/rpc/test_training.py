"""Training jobs over real gRPC: made once, refused with reasons, run in their order, ended, resumed, published."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from tests.conftest import Eventually
from tests.rpc.adapters_kit import failure, refused
from tests.rpc.training_kit import (
    GIB,
    Bench,
    State,
    TrainingClient,
    job_spec,
    jsonl,
    new_bench,
    states,
    talk,
    training_service,
    upload_messages,
)

from slipstream.training.v1 import training_service_pb2 as pb2
from slipstream_server.errors import DependencyUnavailable, GateClosed, IncompatibleAdapter
from slipstream_server.storage.device_ledger import DeviceLedger
from slipstream_server.training.base_models import BaseModel, BaseModels

WHOLE_WAY = ["VALIDATING", "QUEUED", "STARTING", "RUNNING", "EVALUATING", "SUCCEEDED"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TRAINING_BENCH", str(tmp_path))
    return new_bench(tmp_path)


@pytest.fixture
async def service(bench: Bench) -> AsyncIterator[TrainingClient]:
    async with training_service(bench) as client:
        await client.upload("talk")
        yield client
    for process in bench.runners():
        process.kill()


# Made, or refused


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


async def test_the_stored_specification_has_its_defaults(service: TrainingClient) -> None:
    job = await service.create("first")
    assert job.spec.hyperparameters.learning_rate == 2e-4
    assert job.spec.hyperparameters.max_length_tokens == 256  # the model's context
    assert (job.spec.lora.rank, job.spec.lora.alpha) == (8, 16)
    assert list(job.spec.lora.target_modules) == ["all-linear"]
    assert job.spec.dataset.evaluation_fraction == 0.1


async def test_the_same_request_id_makes_one_job(service: TrainingClient) -> None:
    first = await service.create(request_id="once")
    again = await service.create(request_id="once")
    assert again.name == first.name
    other = service.create(request_id="once", max_steps=11)
    assert await refused(other) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert len((await service.jobs.ListTrainingJobs(pb2.ListTrainingJobsRequest())).training_jobs) == 1


async def test_twenty_calls_at_once_with_one_request_id_make_one_job(service: TrainingClient) -> None:
    made = await asyncio.gather(*(service.create(request_id="once") for _ in range(20)))
    assert len({job.name for job in made}) == 1


async def test_a_refused_request_may_be_mended_under_its_id(service: TrainingClient) -> None:
    assert (await refused(service.create(dataset="none", request_id="once")))[1] == "DATASET_NOT_FOUND"
    assert (await service.create(request_id="once")).name


def bad(**fields: Any) -> dict[str, Any]:
    return fields


def numbers(**fields: Any) -> pb2.Hyperparameters:
    return ParseDict(fields, pb2.Hyperparameters())


INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")
UNSUPPORTED = ("INVALID_ARGUMENT", "UNSUPPORTED_FIELD")


@pytest.mark.parametrize(
    ("fields", "field", "expected"),
    [
        ({"learning_rate": "NaN"}, "learning_rate", INVALID),
        ({"learning_rate": "Infinity"}, "learning_rate", INVALID),
        ({"learning_rate": 0}, "learning_rate", INVALID),
        ({"learning_rate": -1}, "learning_rate", INVALID),
        ({"batch_size": 0}, "batch_size", INVALID),
        ({"batch_size": 2**31}, "batch_size", INVALID),
        ({"batch_size": str(2**63 - 1)}, "batch_size", INVALID),
        ({"epochs": -0.0}, "epochs", INVALID),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", INVALID),
        ({"max_length_tokens": 257}, "max_length_tokens", INVALID),
        ({"max_length_tokens": 7}, "max_length_tokens", INVALID),
        ({"seed": 2**32}, "seed", INVALID),
        ({"warmup_steps": 1, "warmup_fraction": 0.5}, "warmup_fraction", INVALID),
        ({"weight_decay": 1.5}, "weight_decay", INVALID),
        ({"max_gradient_norm": 0}, "max_gradient_norm", INVALID),
        ({"packing": True}, "packing", UNSUPPORTED),
        ({"adam_beta1": 0.8}, "adam_beta1", UNSUPPORTED),
        ({"data_type": "DATA_TYPE_FLOAT16"}, "data_type", UNSUPPORTED),
    ],
)
async def test_a_number_out_of_range_is_named(
    service: TrainingClient, fields: dict[str, Any], field: str, expected: tuple[str, str]
) -> None:
    spec = job_spec()
    spec.hyperparameters.MergeFrom(numbers(**fields))
    call = service.jobs.CreateTrainingJob(pb2.CreateTrainingJobRequest(spec=spec))
    code, reason, message, _ = await failure(call)
    assert ((code.name, reason), message.partition(":")[0]) == (expected, f"spec.hyperparameters.{field}")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (bad(dataset="none"), ("NOT_FOUND", "DATASET_NOT_FOUND")),
        (bad(dataset="../x"), INVALID),
        (bad(base_model=""), INVALID),
        (bad(base_model="no-such-model"), ("NOT_FOUND", "MODEL_NOT_FOUND")),
        (bad(base_model="models/none"), ("NOT_FOUND", "MODEL_NOT_FOUND")),
        (bad(base_model="/etc/passwd"), ("PERMISSION_DENIED", "PERMISSION_DENIED")),
        (bad(base_model="tiny", base_model_revision="main"), INVALID),
        (bad(publish="../x"), INVALID),
        (bad(alias="live"), INVALID),
        (bad(publish="a", alias="v3"), INVALID),
        (bad(priority=101), INVALID),
        (bad(full=pb2.FullConfig()), UNSUPPORTED),
        (bad(qlora=pb2.QloraConfig()), UNSUPPORTED),
        (bad(initial_adapter="support"), UNSUPPORTED),
        (bad(engine=pb2.TRAINING_ENGINE_KUBEFLOW), UNSUPPORTED),
        (bad(retries=11), INVALID),
        (bad(resources=pb2.TrainingResources(device_type="tpu")), INVALID),
        (bad(resources=pb2.TrainingResources(device_type="cuda")), UNSUPPORTED),
        (bad(resources=pb2.TrainingResources(node_count=2)), UNSUPPORTED),
        (bad(resources=pb2.TrainingResources(memory_bytes=-1)), INVALID),
        (bad(resources=pb2.TrainingResources(memory_bytes=1 << 40)), ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_specification_that_cannot_run_is_refused(
    service: TrainingClient, spec: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert await refused(service.create(**spec)) == expected


async def test_an_unknown_target_module_is_refused_with_those_there_are(service: TrainingClient) -> None:
    spec = job_spec()
    spec.lora.target_modules[:] = ["q_proj", "w_proj"]
    call = service.jobs.CreateTrainingJob(pb2.CreateTrainingJobRequest(spec=spec))
    code, reason, message, _ = await failure(call)
    assert (code.name, reason) == INVALID
    assert "target_modules[1]" in message
    assert "gate_proj" in message


async def test_an_unknown_module_to_save_is_refused_at_once(service: TrainingClient) -> None:
    spec = job_spec()
    # A part, a layer as a whole, and an output layer that is tied and so not in the file.
    spec.lora.modules_to_save[:] = ["mlp", "layers.0", "lm_head", "w_proj"]
    call = service.jobs.CreateTrainingJob(pb2.CreateTrainingJobRequest(spec=spec))
    code, reason, message, _ = await failure(call)
    assert ((code.name, reason), message.partition(":")[0]) == (INVALID, "spec.lora.modules_to_save[3]")


async def test_an_alias_generation_below_zero_is_refused(service: TrainingClient) -> None:
    spec = job_spec(publish="support", alias="live")
    spec.publish.expected_alias_generation = -1
    call = service.jobs.CreateTrainingJob(pb2.CreateTrainingJobRequest(spec=spec))
    code, reason, message, _ = await failure(call)
    assert (code.name, reason) == INVALID
    assert message.partition(":")[0] == "spec.publish.expected_alias_generation"


async def test_an_adapter_of_another_base_is_refused_before_anything_is_trained(
    service: TrainingClient, bench: Bench
) -> None:
    bench.registry.bases = {"support": "models/other", "fitting": "models/tiny"}
    call = service.create("job", publish="support")
    assert await refused(call) == ("FAILED_PRECONDITION", "INCOMPATIBLE_ADAPTER")
    assert (await service.create("fits", publish="fitting", validate_only=True)).spec.publish.adapter
    # A registry that cannot be asked keeps nobody from training.
    bench.registry.is_away = True
    assert (await service.create("job", publish="support")).name == "trainingJobs/job"


async def test_a_base_model_outside_the_allowed_folders_is_named_by_its_field(service: TrainingClient) -> None:
    _, _, message, _ = await failure(service.create(base_model="/etc/passwd"))
    assert message.partition(":")[0] == "spec.base_model"


async def test_a_job_on_a_file_without_rows_is_refused_naming_no_line(service: TrainingClient) -> None:
    await service.upload_files("empty", {"train.jsonl": b""})
    code, reason, message, _ = await failure(service.create(dataset="empty"))
    assert (code.name, reason) == ("FAILED_PRECONDITION", "INVALID_DATASET")
    assert "the first in train.jsonl: the file has no rows" in message


async def test_a_template_that_hides_answers_fails_the_job_naming_row_and_field(
    service: TrainingClient, bench: Bench
) -> None:
    hidden = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    (bench.model / "chat_template.jinja").write_text(hidden)
    call = service.create(validate_only=True)
    code, reason, message, metadata = await failure(call)
    assert (code.name, reason) == ("FAILED_PRECONDITION", "INVALID_DATASET")
    assert message.startswith("train.jsonl, line 1, messages")
    assert metadata["row_error"] in ("NOTHING_TO_LEARN", "TEMPLATE_REWRITES_ANSWER")
    await service.create("job")
    job = await service.until("job", State.STATE_FAILED)
    info = error_details_pb2.ErrorInfo()
    job.error.details[0].Unpack(info)
    assert (info.reason, info.metadata["line"], info.metadata["field"]) == ("INVALID_DATASET", "1", "messages")


async def test_invalid_rows_are_left_out_where_the_job_says_so(service: TrainingClient) -> None:
    await service.upload("patchy", *talk(9), {"messages": []})
    assert await refused(service.create(dataset="patchy")) == ("FAILED_PRECONDITION", "INVALID_DATASET")
    spec = job_spec(dataset="patchy")
    spec.dataset.skip_invalid_rows = True
    await service.jobs.CreateTrainingJob(pb2.CreateTrainingJobRequest(training_job_id="job", spec=spec))
    assert states(await service.events("job")) == WHOLE_WAY


async def test_validate_only_checks_rows_and_queues_nothing(service: TrainingClient, bench: Bench) -> None:
    job = await service.create("job", validate_only=True)
    assert (job.name, job.spec.hyperparameters.max_length_tokens) == ("", 256)
    assert await refused(service.get("job")) == ("NOT_FOUND", "JOB_NOT_FOUND")
    assert not (bench.folder / "jobs").exists()


async def test_an_estimate_counts_what_is_trained(service: TrainingClient) -> None:
    response = await service.jobs.EstimateTrainingJob(pb2.EstimateTrainingJobRequest(spec=job_spec(max_steps=7)))
    # By hand: rank 8 times inputs plus outputs of four 8x8 and three 8x16 matrices.
    assert response.trainable_parameter_count == 8 * (4 * 16 + 3 * 24)
    assert response.total_steps == 7
    assert response.memory.optimizer_bytes == 8 * response.trainable_parameter_count
    assert response.fits
    assert response.available_memory_bytes == 64 * GIB


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
    waiting = await service.get("high")
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


# Publishing


async def test_a_result_is_published_and_the_alias_moved(service: TrainingClient, bench: Bench) -> None:
    await service.create("job", publish="support", alias="live")
    events = await service.events("job")
    assert states(events)[-2:] == ["PUBLISHING", "SUCCEEDED"]
    job = await service.get("job")
    assert job.result.adapter_version == "adapters/support/versions/v1"
    assert (job.result.alias.moved, job.result.alias.generation) == (True, 1)
    (upload,) = bench.registry.uploads
    assert (upload.job, upload.dataset, upload.plan.base_model_name) == ("job", "talk", "models/tiny")
    assert job.result.dataset_digest == f"sha256:{upload.plan.dataset_digest}"
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds.index("result_published") < kinds.index("alias_outcome")


@pytest.mark.parametrize(("registered", "expected"), [("models/tiny", "models/tiny"), ("", "org/tiny")])
async def test_a_base_of_two_names_is_published_under_the_one_its_adapter_has(
    service: TrainingClient, bench: Bench, monkeypatch: pytest.MonkeyPatch, registered: str, expected: str
) -> None:
    resolve = BaseModels.resolve

    def from_a_hub(self: BaseModels, *args: Any, **kwargs: Any) -> BaseModel:
        return dataclasses.replace(resolve(self, *args, **kwargs), name="org/tiny")

    monkeypatch.setattr(BaseModels, "resolve", from_a_hub)
    bench.registry.bases = {"support": registered}
    await service.create("job", publish="support")
    await service.until("job", State.STATE_SUCCEEDED)
    assert [upload.plan.base_model_name for upload in bench.registry.uploads] == [expected]


async def test_a_closed_gate_leaves_version_and_job_as_they_are(service: TrainingClient, bench: Bench) -> None:
    bench.registry.refusal = GateClosed("the gate asks for a lower eval_loss")
    await service.create("job", publish="support", alias="live")
    job = await service.until("job", State.STATE_SUCCEEDED)
    assert job.result.adapter_version == "adapters/support/versions/v1"
    assert not job.result.alias.moved
    assert "lower eval_loss" in job.result.alias.error.message


async def test_publishing_waits_for_a_registry_that_is_away(service: TrainingClient, bench: Bench) -> None:
    bench.registry.failures = [DependencyUnavailable("away"), DependencyUnavailable("away")]
    await service.create("job", publish="support")
    job = await service.until("job", State.STATE_SUCCEEDED)
    assert len(bench.registry.uploads) == 3
    assert len({upload.request_id for upload in bench.registry.uploads}) == 1
    assert job.result.adapter_version == "adapters/support/versions/v1"


async def test_a_refused_adapter_fails_the_job(service: TrainingClient, bench: Bench) -> None:
    bench.registry.failures = [IncompatibleAdapter("another base")]
    await service.create("job", publish="support")
    job = await service.until("job", State.STATE_FAILED)
    assert job.error.message == "another base"


async def test_a_damaged_result_is_not_published(service: TrainingClient, bench: Bench) -> None:
    bench.registry.failures = [DependencyUnavailable("away")]
    await service.create("job", publish="support")
    await service.until("job", State.STATE_PUBLISHING)
    (bench.folder / "jobs" / "job" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    job = await service.until("job", State.STATE_FAILED)
    assert "not what the runner wrote" in job.error.message


# A service that comes and goes


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
