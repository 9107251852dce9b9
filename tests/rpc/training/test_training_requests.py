"""Training jobs over real gRPC: made once with their defaults, checked, or refused with reasons."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from tests.rpc.adapters_kit import failure, refused
from tests.rpc.training_kit import (
    GIB,
    INVALID,
    WHOLE_WAY,
    Bench,
    State,
    TrainingClient,
    job_spec,
    states,
    talk,
)

from slipstream.training.v1 import training_service_pb2 as pb2


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
