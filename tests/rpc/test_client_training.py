"""Datasets and jobs through the client, against a service that loses connections."""

import hashlib
import random
import time

import grpc
import pytest
from tests.unit.client.fake_services import Failure, settings_for
from tests.unit.client.fake_training import FakeTraining as Fake
from tests.unit.client.fake_training import Job, TrainingThread, changed, event, serving_training, short_training

from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream_client import SlipstreamClient, SyncSlipstreamClient, jobs
from slipstream_client.errors import (
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
)


@pytest.fixture
async def fake():
    return Fake()


@pytest.fixture
async def client(fake, monkeypatch):
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.01)
    async with serving_training(fake) as address, SlipstreamClient(settings=settings_for(address)) as connected:
        yield connected


def unavailable() -> Failure:
    return Failure(code=grpc.StatusCode.UNAVAILABLE, reason="DRAINING")


async def test_a_file_is_sent_whole_and_announced_with_its_hash(client, fake, tmp_path):
    content = random.Random(1).randbytes(2_500_000)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    seen = []
    dataset = await client.datasets.upload(file, "desk", format="messages", labels={"a": "b"}, on_progress=seen.append)
    assert (dataset.name, dataset.id, dataset.state) == ("datasets/desk", "desk", "validating")
    assert fake.uploads == [{"rows.jsonl": content}]
    (header,) = fake.asked("UploadDataset")
    assert header.files[0].file.sha256 == hashlib.sha256(content).hexdigest()
    assert header.files[0].file.size_bytes == 2_500_000
    assert (header.dataset_id, header.format, dict(header.labels)) == (
        "desk",
        dataset_pb2.DATASET_FORMAT_MESSAGES,
        {"a": "b"},
    )
    for stage in ("hashing", "sending"):
        counts = [progress.completed_count for progress in seen if progress.stage == stage]
        assert counts == [0, 1048576, 2097152, 2_500_000]
    assert {progress.total_count for progress in seen} == {2_500_000}


async def test_bytes_and_splits(client, fake, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("rows.jsonl", "a/rows.jsonl"):
        (tmp_path / name).write_bytes(name.encode())
    await client.datasets.upload(b"{}\n")
    await client.datasets.upload({"train": tmp_path / "rows.jsonl", "validation": str(tmp_path / "a" / "rows.jsonl")})
    assert fake.uploads == [
        {"train.jsonl": b"{}\n"},
        {"rows.jsonl": b"rows.jsonl", "validation/rows.jsonl": b"a/rows.jsonl"},
    ]
    assert [file.split for file in fake.asked("UploadDataset")[1].files] == ["train", "validation"]


async def test_an_upload_is_repeated_with_the_same_request_id(client, fake):
    fake.failures.append(unavailable())
    await client.datasets.upload(b"{}\n")
    first, second = fake.asked("UploadDataset")
    assert first.request_id == second.request_id
    assert first.request_id
    assert fake.uploads == [{"train.jsonl": b"{}\n"}]


async def test_a_file_that_changes_while_it_is_sent_is_an_error(client, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"x" * 100)

    def change(progress):
        if progress.stage == "sending" and progress.completed_count == 0:
            file.write_bytes(b"y" * 100)

    with pytest.raises(FailedPreconditionError, match="changed while it was being sent"):
        await client.datasets.upload(file, on_progress=change)


async def test_what_cannot_be_read_is_refused_by_name(client, tmp_path):
    with pytest.raises(InvalidRequestError, match=r"nothing\.jsonl"):
        await client.datasets.upload(tmp_path / "nothing.jsonl")
    with pytest.raises(InvalidRequestError, match="is not a file"):
        await client.datasets.upload(tmp_path)
    with pytest.raises(InvalidRequestError, match="'colours' is not one of messages, prompt_completion"):
        await client.datasets.upload(b"{}", format="colours")


async def test_waiting_ends_when_the_rows_are_read(client, fake):
    fake.looks_until_settled = 2
    fake.dataset.state = dataset_pb2.Dataset.STATE_INVALID
    fake.dataset.row_errors.add(
        path="train.jsonl", line_number=17, reason=dataset_pb2.ROW_ERROR_REASON_EMPTY_TEXT, message="empty"
    )
    states = []
    dataset = await client.datasets.wait("desk", on_change=lambda seen: states.append(seen.state))
    assert states == ["validating", "validating", "invalid"]
    assert [(error.line_number, error.reason) for error in dataset.row_errors] == [(17, "empty_text")]


async def test_every_page_is_listed_up_to_the_limit(client, fake):
    assert [dataset.id for dataset in await client.datasets.list(states=["ready"])] == ["desk-1", "desk-2", "desk-3"]
    assert [dataset.id for dataset in await client.datasets.list(limit=2)] == ["desk-1", "desk-2"]
    assert fake.asked("ListDatasets")[0].states == [dataset_pb2.Dataset.STATE_READY]


async def test_preview_has_the_mask(client, fake):
    fake.preview = dataset_pb2.PreviewDatasetResponse(
        rows=[
            dataset_pb2.PreviewRow(
                row_index=3,
                tokens=[
                    dataset_pb2.PreviewToken(token_id=1, text="Hi"),
                    dataset_pb2.PreviewToken(token_id=2, text=" there", in_loss=True),
                ],
            )
        ],
        row_count=9,
        token_statistics=dataset_pb2.TokenStatistics(row_count=9, max_tokens=2),
    )
    preview = await client.datasets.preview("desk", base_model="tiny", row_count=5, max_length_tokens=64)
    assert [(token.text, token.in_loss) for token in preview.rows[0].tokens] == [("Hi", False), (" there", True)]
    assert preview.token_statistics.max_tokens == 2
    (request,) = fake.asked("PreviewDataset")
    assert (request.page_size, request.max_length_tokens, request.base_model) == (5, 64, "tiny")


async def test_a_job_is_asked_for_in_the_contracts_words(client, fake):
    fake.failures.append(unavailable())
    job = await client.jobs.create(
        "tiny",
        "desk",
        lora={"rank": 4, "target_modules": ["all-linear"], "bias": "none"},
        hyperparameters={"max_steps": 20, "learning_rate": 2e-3, "scheduler": "cosine", "data_type": "float32"},
        selection={"evaluation_fraction": 0.0, "train_on_prompt": True},
        evaluation={"interval_steps": 5},
        publish={"adapter": "desk", "alias": "live"},
        retry_policy={"initial_backoff": 1.5},
        loop="native",
        display_name="first",
    )
    request, again = fake.asked("CreateTrainingJob")
    assert request.request_id == again.request_id
    spec = request.spec
    assert (spec.base_model, spec.dataset.dataset, spec.lora.rank) == ("tiny", "desk", 4)
    assert spec.dataset.HasField("evaluation_fraction")
    assert spec.dataset.train_on_prompt
    assert (spec.hyperparameters.max_steps, spec.hyperparameters.learning_rate) == (20, 2e-3)
    assert not spec.hyperparameters.HasField("epochs")
    assert spec.retry_policy.initial_backoff.ToMilliseconds() == 1500
    assert (spec.publish.adapter, spec.publish.alias, request.display_name) == ("desk", "live", "first")
    assert job.spec["hyperparameters"] == {
        "max_steps": 20,
        "learning_rate": 2e-3,
        "scheduler": "cosine",
        "data_type": "float32",
    }


async def test_without_a_method_it_is_lora(client, fake):
    await client.jobs.create("tiny", "desk")
    assert fake.asked("CreateTrainingJob")[0].spec.WhichOneof("method") == "lora"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hyperparameters": {"epoch": 3}}, r"spec\.hyperparameters\.epoch: there is no such field"),
        ({"hyperparameters": {"scheduler": "steep"}}, r"'steep' is not one of linear, cosine"),
        ({"hyperparameters": {"epochs": "many"}}, r"spec\.hyperparameters\.epochs: 'many' does not fit"),
        ({"lora": {"target_modules": "q_proj"}}, r"spec\.lora\.target_modules: 'q_proj' is one text"),
        ({"lora": {}, "full": {}}, "lora and full exclude each other"),
        ({"retry_policy": {"initial_backoff": "1s"}}, "is not a number of seconds"),
    ],
)
async def test_bad_options_are_refused_by_their_path(client, fake, options, said):
    with pytest.raises(InvalidRequestError, match=said):
        await client.jobs.create("tiny", "desk", **options)
    assert fake.requests == []
    with pytest.raises(TypeError, match="'colour'"):
        await client.jobs.create("tiny", "desk", colour="red")


async def test_a_watch_survives_lost_connections_without_gap_or_duplicate(client, fake):
    for seed in range(10):
        dice = random.Random(seed)
        fake.breaks.extend(dice.randrange(4) for _ in range(8))
        lost = []
        seen = [e async for e in client.jobs.watch("j1", on_disconnect=lost.append)]
        assert [e.sequence for e in seen] == list(range(1, len(fake.events) + 1))
        assert seen[-1].payload.state == "succeeded"
        assert len(lost) == 8 or fake.breaks
        fake.breaks.clear()


async def test_a_watch_goes_on_from_where_it_is_told(client, fake):
    seen = [e async for e in client.jobs.watch("j1", after_sequence=len(fake.events) - 2)]
    assert [e.kind for e in seen] == ["alias_outcome", "state_changed"]
    assert [e async for e in client.jobs.watch("j1", after_sequence=len(fake.events))] == []


async def test_a_watch_waits_for_what_has_not_happened(client, fake):
    fake.release(2)
    watching = client.jobs.watch("j1")
    assert [(await anext(watching)).sequence, (await anext(watching)).sequence] == [1, 2]
    fake.release(None)
    assert [e.sequence async for e in watching] == list(range(3, len(fake.events) + 1))


async def test_leaving_a_watch_ends_it_on_the_server(client, fake, assert_eventually):
    fake.release(1)
    watching = client.jobs.watch("j1")
    await anext(watching)
    await watching.aclose()
    await assert_eventually(fake.cancelled.is_set)


async def test_a_gap_is_a_broken_contract(client, fake):
    fake.events = [event(1, **changed(Job.STATE_QUEUED)), event(3, **changed(Job.STATE_SUCCEEDED))]
    with pytest.raises(ProtocolError, match="event 3 came after 1"):
        [e async for e in client.jobs.watch("j1")]


async def test_a_watch_of_nothing_is_an_error_at_once(client, fake, monkeypatch):
    async def refuse(request, context):
        await Failure(code=grpc.StatusCode.NOT_FOUND, reason="JOB_NOT_FOUND").abort(context)
        yield

    monkeypatch.setattr(fake, "WatchTrainingJob", refuse)
    async with serving_training(fake) as address, SlipstreamClient(settings=settings_for(address)) as other:
        with pytest.raises(NotFoundError):
            [e async for e in other.jobs.watch("j1")]


async def test_a_watch_gives_up_at_its_own_timeout(monkeypatch):
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.01)
    async with SlipstreamClient(settings=settings_for("127.0.0.1:1")) as client:
        began_s = time.monotonic()
        with pytest.raises(UnavailableError):
            [e async for e in client.jobs.watch("j1", timeout_s=0.3)]
        assert time.monotonic() - began_s < 3


async def test_the_rest_of_a_job(client, fake):
    job = await client.jobs.get("j1")
    assert (job.state, job.has_ended, job.result.run_duration_s) == ("succeeded", True, 72.5)
    assert job.result.alias.generation == 1
    assert [j.id for j in await client.jobs.list(states=["succeeded"])] == ["j1"]
    assert [c.step for c in await client.jobs.checkpoints("j1")] == [4]
    assert (await client.jobs.cancel("j1", grace_s=0)).state == "cancelled"
    assert fake.asked("CancelTrainingJob")[0].HasField("grace")
    await client.jobs.delete("j1", etag="e")
    await client.datasets.delete("desk")
    assert (fake.asked("DeleteTrainingJob")[0].etag, fake.asked("DeleteDataset")[0].name) == ("e", "desk")


def test_without_an_event_loop():
    with TrainingThread() as server, SyncSlipstreamClient(settings=settings_for(server.address)) as client:
        assert client.datasets.upload(b"{}\n").state == "validating"
        assert client.jobs.create("tiny", "desk").id == "j1"
        assert [e.sequence for e in client.jobs.watch("j1")] == list(range(1, len(short_training()) + 1))
        server.fake.release(1)
        for _ in client.jobs.watch("j1"):
            break
        assert server.run(server.fake.cancelled.wait())
