"""Datasets over real gRPC: taken whole or not at all, errors of rows as data, previews with tokens and loss mask."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.rpc.adapters_kit import failure, refused
from tests.rpc.training_kit import (
    TEMPLATE,
    Bench,
    State,
    TrainingClient,
    chat,
    jsonl,
    new_bench,
    talk,
    training_service,
    upload_messages,
)

from slipstream.training.v1 import dataset_service_pb2 as pb2
from slipstream.type.v1 import artifact_pb2

Dataset = pb2.Dataset


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TRAINING_BENCH", str(tmp_path))
    return new_bench(tmp_path)


@pytest.fixture
async def service(bench: Bench) -> AsyncIterator[TrainingClient]:
    async with training_service(bench) as client:
        yield client


async def preview(service: TrainingClient, **fields: object) -> pb2.PreviewDatasetResponse:
    return await service.datasets.PreviewDataset(pb2.PreviewDatasetRequest(**fields))


async def test_uploaded_rows_are_counted_and_described(service: TrainingClient) -> None:
    dataset = await service.upload("talk", display_name="Small talk", labels={"team": "a"})
    assert dataset.state == Dataset.STATE_READY
    assert (dataset.row_count, dataset.invalid_row_count, len(dataset.row_errors)) == (10, 0, 0)
    assert dataset.format == pb2.DATASET_FORMAT_MESSAGES
    assert [(split.name, split.row_count) for split in dataset.splits] == [("train", 10)]
    assert dataset.size_bytes == len(jsonl(talk()))
    assert (dataset.display_name, dict(dataset.labels)) == ("Small talk", {"team": "a"})
    found = await service.datasets.GetDataset(pb2.GetDatasetRequest(name="datasets/talk"))
    assert found == dataset


async def test_broken_row_17_is_an_error_with_line_and_field(service: TrainingClient) -> None:
    rows: list[object] = talk(20)
    rows[16] = {"messages": [{"role": "user", "content": "hi"}, {"role": "butler", "content": "yes"}]}
    dataset = await service.upload("talk", *rows)
    assert dataset.state == Dataset.STATE_INVALID
    (error,) = dataset.row_errors
    assert (error.split, error.path, error.line_number) == ("train", "train.jsonl", 17)
    assert (error.field, error.reason) == ("messages[1].role", pb2.ROW_ERROR_REASON_UNKNOWN_ROLE)
    assert "butler" in error.message
    assert [(each.reason, each.count) for each in dataset.error_counts] == [(error.reason, 1)]
    assert (dataset.row_count, dataset.invalid_row_count) == (20, 1)
    code, reason, message, metadata = await failure(service.create("job"))
    assert (code.name, reason) == ("FAILED_PRECONDITION", "INVALID_DATASET")
    assert "line 17, messages[1].role" in message
    assert (metadata["line"], metadata["field"]) == ("17", "messages[1].role")


async def test_rows_of_two_files_must_be_of_one_format(service: TrainingClient) -> None:
    files = {"a.jsonl": jsonl(talk(2)), "b.jsonl": jsonl([{"prompt": "p", "completion": "c"}])}
    dataset = await service.upload_files("mixed", files, splits={"b.jsonl": "test"})
    (error,) = dataset.row_errors
    assert (error.path, error.split, error.reason) == ("b.jsonl", "test", pb2.ROW_ERROR_REASON_MIXED_FORMATS)
    assert [(split.name, split.invalid_row_count) for split in dataset.splits] == [("train", 0), ("test", 1)]


async def test_wrong_hash_stores_nothing(service: TrainingClient, bench: Bench) -> None:
    wrong = hashlib.sha256(b"something else").hexdigest()
    assert await refused(service.upload("talk", sha256=wrong)) == ("FAILED_PRECONDITION", "CORRUPT_ARTIFACT")
    get = service.datasets.GetDataset(pb2.GetDatasetRequest(name="talk"))
    assert await refused(get) == ("NOT_FOUND", "DATASET_NOT_FOUND")
    assert not [path for path in (bench.folder / "artifacts").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m[:-1], ("FAILED_PRECONDITION", "CORRUPT_ARTIFACT")),
        (lambda m: m[1:], ("INVALID_ARGUMENT", "INVALID_FIELD")),
        (lambda m: [m[0], *reversed(m[1:])], ("INVALID_ARGUMENT", "INVALID_FIELD")),
        (lambda m: [*m, m[-1]], ("INVALID_ARGUMENT", "INVALID_FIELD")),
        (lambda m: [m[0], *m], ("INVALID_ARGUMENT", "INVALID_FIELD")),
        (lambda m: [], ("INVALID_ARGUMENT", "INVALID_FIELD")),
    ],
    ids=["cut", "no_header", "out_of_order", "too_much", "header_twice", "nothing"],
)
async def test_chunks_that_do_not_fit_are_refused(service: TrainingClient, change, expected) -> None:  # type: ignore[no-untyped-def]
    messages = change(list(upload_messages("talk", {"train.jsonl": jsonl(talk())}, chunk_bytes=300)))
    assert await refused(service.datasets.UploadDataset(iter(messages))) == expected
    assert not (await service.datasets.ListDatasets(pb2.ListDatasetsRequest())).datasets


@pytest.mark.parametrize(
    "path",
    ["../x.jsonl", "/etc/passwd", "a\\b.jsonl", "a/../b.jsonl", "", ".jsonl", "x" * 300 + ".jsonl", "x.exe", "х.jsonl"],
)
async def test_names_that_lead_elsewhere_are_refused(service: TrainingClient, path: str) -> None:
    call = service.upload_files("talk", {path: jsonl(talk())})
    assert await refused(call) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_files_of_other_kinds_are_unsupported(service: TrainingClient) -> None:
    call = service.upload_files("talk", {"rows.csv": b"a,b\n"})
    assert await refused(call) == ("INVALID_ARGUMENT", "UNSUPPORTED_FIELD")


async def test_an_announcement_over_the_limit_is_refused_before_a_byte_is_sent(service: TrainingClient) -> None:
    announced = dataset_file(size_bytes=10 * 1024**3)
    header = pb2.UploadDatasetHeader(dataset_id="talk", files=[announced])
    call = service.datasets.UploadDataset(iter([pb2.UploadDatasetRequest(header=header)]))
    assert await refused(call) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")


def dataset_file(*, size_bytes: int) -> pb2.DatasetFile:
    file = artifact_pb2.ArtifactFile(path="train.jsonl", size_bytes=size_bytes, sha256="0" * 64)
    return pb2.DatasetFile(file=file)


async def test_a_repeated_request_id_makes_one_dataset(service: TrainingClient) -> None:
    first = await service.upload("", request_id="once")
    again = await service.upload("", request_id="once")
    assert again.name == first.name
    assert len((await service.datasets.ListDatasets(pb2.ListDatasetsRequest())).datasets) == 1
    other = service.upload("", *talk(3), request_id="once")
    assert await refused(other) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_an_upload_that_failed_does_not_use_up_its_request_id(service: TrainingClient) -> None:
    messages = list(upload_messages("talk", {"train.jsonl": jsonl(talk())}, request_id="once"))
    cut = service.datasets.UploadDataset(iter(messages[:1]))
    assert await refused(cut) == ("FAILED_PRECONDITION", "CORRUPT_ARTIFACT")
    assert (await service.datasets.UploadDataset(iter(messages))).name == "datasets/talk"


async def test_a_taken_name_is_refused(service: TrainingClient) -> None:
    await service.upload("talk")
    assert await refused(service.upload("talk", *talk(3))) == ("ALREADY_EXISTS", "ALREADY_EXISTS")


async def test_validate_only_finds_errors_and_keeps_nothing(service: TrainingClient) -> None:
    dataset = await service.upload("talk", *talk(3), {"prompt": "p"}, validate_only=True)
    assert (dataset.name, dataset.state) == ("", Dataset.STATE_INVALID)
    assert [error.line_number for error in dataset.row_errors] == [4]
    assert not (await service.datasets.ListDatasets(pb2.ListDatasetsRequest())).datasets


async def test_lists_come_newest_first_in_pages(service: TrainingClient) -> None:
    for name in ("a", "b", "c"):
        await service.upload(name, *talk(1 if name == "b" else 2))
    first = await service.datasets.ListDatasets(pb2.ListDatasetsRequest(page_size=2))
    request = pb2.ListDatasetsRequest(page_size=2, page_token=first.next_page_token)
    second = await service.datasets.ListDatasets(request)
    names = [dataset.name for page in (first, second) for dataset in page.datasets]
    assert names == ["datasets/c", "datasets/b", "datasets/a"]
    assert second.next_page_token == ""


async def test_a_dataset_is_not_deleted_under_a_job(service: TrainingClient, bench: Bench) -> None:
    bench.say("hold-at", 2)
    dataset = await service.upload("talk")
    await service.create("job")
    await service.until_step("job", 2)
    delete = pb2.DeleteDatasetRequest(name="talk")
    assert await refused(service.datasets.DeleteDataset(delete)) == ("FAILED_PRECONDITION", "WRONG_STATE")
    bench.say("hold-at", "")
    await service.until("job", State.STATE_SUCCEEDED)
    stale = service.datasets.DeleteDataset(pb2.DeleteDatasetRequest(name="talk", etag="0"))
    assert await refused(stale) == ("ABORTED", "STALE_ETAG")
    await service.datasets.DeleteDataset(pb2.DeleteDatasetRequest(name="talk", etag=dataset.etag))
    assert await refused(service.datasets.DeleteDataset(delete)) == ("NOT_FOUND", "DATASET_NOT_FOUND")


async def test_preview_shows_text_tokens_and_what_is_learnt(service: TrainingClient) -> None:
    await service.upload("talk", chat("Hé?", "Oui."), chat("a", "b"))
    shown = await preview(service, name="talk", base_model="tiny")
    row = shown.rows[0]
    # The template by hand; what is learnt is the answer and the token that ends it.
    expected = "<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\nOui.<|im_end|>\n"
    assert row.rendered_text == expected
    assert "".join(token.text for token in row.tokens if token.in_loss) == "Oui.<|im_end|>"
    # Bytes are tokens here, and each special token is one; an answer's last newline is not its own.
    assert len(row.tokens) == 4 + len("user\nHé?\nassistant\nOui.\n".encode())
    assert dict(row.fields["messages"][0]) == {"role": "user", "content": "Hé?"}
    lengths = sorted(len(each.tokens) for each in shown.rows)
    statistics = shown.token_statistics
    assert (statistics.row_count, statistics.min_tokens, statistics.max_tokens) == (2, lengths[0], lengths[1])
    assert "im_start" in TEMPLATE


async def test_preview_cuts_and_says_so(service: TrainingClient) -> None:
    await service.upload("talk", chat("q" * 100, "answer"))
    shown = await preview(service, name="talk", base_model="tiny", max_length_tokens=20)
    assert shown.rows[0].truncated
    assert len(shown.rows[0].tokens) == 20
    assert shown.token_statistics.truncated_row_count == 1
    assert shown.token_statistics.max_tokens > 100


async def test_preview_without_a_model_shows_fields_and_errors(service: TrainingClient) -> None:
    await service.upload("talk", chat("a", "b"), {"messages": "none"}, chat("c", "d"))
    shown = await preview(service, name="talk", start_row=1, page_size=2)
    assert [row.row_index for row in shown.rows] == [1, 2]
    assert shown.rows[0].errors[0].reason == pb2.ROW_ERROR_REASON_WRONG_TYPE
    assert not shown.rows[1].tokens
    assert (shown.row_count, shown.HasField("token_statistics")) == (3, False)


async def test_preview_of_what_is_not_there(service: TrainingClient) -> None:
    await service.upload("talk")
    assert await refused(preview(service, name="other")) == ("NOT_FOUND", "DATASET_NOT_FOUND")
    assert await refused(preview(service, name="talk", split="test")) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert await refused(preview(service, name="talk", page_size=-1)) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    unknown = preview(service, name="talk", base_model="models/none")
    assert await refused(unknown) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    outside = preview(service, name="talk", base_model="/etc")
    assert (await refused(outside))[0] == "PERMISSION_DENIED"
    assert not (await preview(service, name="talk", start_row=10)).rows
