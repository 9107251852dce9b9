"""``slipstream datasets``, ``train`` and ``jobs`` against a service that plays a job."""

import io
import json
import signal
import subprocess
import sys

import grpc
import pytest
from tests.unit.client.fake_services import Failure
from tests.unit.client.fake_training import Job, TrainingThread, changed, event, failed_status, row

from slipstream.training.v1 import dataset_service_pb2 as dataset_pb2
from slipstream_client.cli import main


@pytest.fixture
def server(monkeypatch):
    with TrainingThread() as running:
        monkeypatch.setenv("SLIPSTREAM_TRAINING_ADDRESS", running.address)
        yield running


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process; (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slipstream", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    return file


def make_invalid(fake):
    fake.dataset.state = dataset_pb2.Dataset.STATE_INVALID
    fake.dataset.row_errors.add(
        path="rows.jsonl",
        line_number=17,
        field="completion",
        reason=dataset_pb2.ROW_ERROR_REASON_EMPTY_TEXT,
        message="is empty",
    )
    fake.dataset.error_counts.add(reason=dataset_pb2.ROW_ERROR_REASON_EMPTY_TEXT, count=1)


def test_train_uploads_queues_and_watches(server, cli, rows):
    server.fake.breaks.extend([3, 0, 5])
    code, out, err = cli(
        "train", str(rows), "--base", "tiny", "--adapter", "desk", "--alias", "live", "--max-steps", "4", "--rank", "4",
        "--learning-rate", "2e-3", "--scheduler", "cosine", "--warmup", "0.1", "--target-module", "q_proj",
        "--evaluate-every", "2", "--device", "cpu", "--seed", "0",
    )  # fmt: skip
    assert code == 0
    assert list(server.fake.uploads[0].values()) == [rows.read_bytes()]
    (request,) = server.fake.asked("CreateTrainingJob")
    spec = request.spec
    assert (spec.base_model, spec.dataset.dataset) == ("tiny", "datasets/desk")
    assert (spec.publish.adapter, spec.publish.alias) == ("desk", "live")
    assert (spec.lora.rank, list(spec.lora.target_modules)) == (4, ["q_proj"])
    hyperparameters = spec.hyperparameters
    assert (hyperparameters.max_steps, hyperparameters.learning_rate, hyperparameters.warmup_fraction) == (4, 2e-3, 0.1)
    assert hyperparameters.HasField("seed")
    assert not hyperparameters.HasField("epochs")
    assert (spec.evaluation.interval_steps, spec.resources.device_type) == (2, "cpu")
    assert not spec.HasField("checkpoints")
    for said in ("queued", "4 · loss 0.7500", "base · eval_loss 3", "desk@v1", "desk@live points at it"):
        assert said in out
    assert "held-out loss 3.000 → 1.500 (-50%)" in out
    assert err.count("the watch goes on when the service is back") == 2
    assert server.fake.watches == [0, 3, 3, 8]


def test_train_as_json_is_one_object_a_line(server, cli, rows):
    code, out, _ = cli("train", str(rows), "--base", "tiny", "--adapter", "desk", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["event"] for line in lines[:3]] == ["dataset_uploaded", "job_created", "state_changed"]
    assert [line["sequence"] for line in lines[2:]] == list(range(1, len(server.fake.events) + 1))
    assert lines[-1]["state"] == "succeeded"


def test_train_without_watching(server, cli):
    code, out, _ = cli("train", "datasets/desk", "--base", "tiny", "--adapter", "desk", "--no-watch")
    assert code == 0
    assert "slipstream jobs watch j1" in out
    assert (server.fake.uploads, server.fake.watches) == ([], [])


def test_a_file_that_is_wrong_as_a_whole_is_named_without_a_line(server, cli):
    server.fake.dataset.row_errors.add(path="rows.jsonl", message="the file has no rows")
    out = cli("datasets", "get", "desk")[1]
    assert "rows.jsonl" in out
    assert "rows.jsonl:" not in out


def test_rows_that_cannot_be_trained_on_end_it_before_a_job(server, cli, rows):
    make_invalid(server.fake)
    code, out, err = cli("train", str(rows), "--base", "tiny", "--adapter", "desk")
    assert code == 1
    assert "rows.jsonl:17" in out
    assert "empty text" in out
    assert "--skip-invalid-rows" in err
    assert server.fake.asked("CreateTrainingJob") == []
    assert cli("train", str(rows), "--base", "tiny", "--adapter", "desk", "--skip-invalid-rows")[0] == 0
    assert server.fake.asked("CreateTrainingJob")[0].spec.dataset.skip_invalid_rows


def test_a_failed_job_exits_with_1_and_says_why(server, cli):
    error = failed_status("the loss was not finite at step 3")
    server.fake.events = [
        event(1, **changed(Job.STATE_QUEUED)),
        event(2, **changed(Job.STATE_FAILED, error=error)),
    ]
    code, out, _ = cli("jobs", "watch", "j1")
    assert code == 1
    assert "✗ j1 failed: the loss was not finite at step 3" in out


def test_jobs_list_get_cancel_and_delete(server, cli):
    assert cli("train", "datasets/desk", "--base", "models/tiny", "--adapter", "desk", "--no-watch")[0] == 0
    code, out, _ = cli("jobs", "list", "--state", "succeeded", "--limit", "5")
    assert code == 0
    assert out.splitlines()[2].split()[:4] == ["j1", "succeeded", "tiny", "desk"]
    assert json.loads(cli("jobs", "list", "--json")[1])["result"]["metrics"] == {"eval_loss": 1.5}
    assert "170 trained on" in cli("jobs", "get", "j1")[1]
    assert "cancelled" in cli("jobs", "cancel", "j1", "--grace", "1")[1]
    assert json.loads(cli("jobs", "delete", "j1", "--json")[1]) == {"deleted": "j1"}


def test_interrupting_a_watch_leaves_the_job_alone(server):
    server.fake.release(1)
    running = subprocess.Popen(
        [sys.executable, "-m", "slipstream_client.cli", "jobs", "watch", "j1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "validating" in running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
        assert "the job goes on: slipstream jobs watch j1" in running.stderr.read()
        assert server.fake.asked("CancelTrainingJob") == []
    finally:
        running.kill()
        running.communicate()


def test_upload_tells_what_is_wrong_with_each_row(server, cli, rows, tmp_path):
    make_invalid(server.fake)
    code, out, _ = cli(
        "datasets", "upload", str(rows), "--name", "desk", "--map", "prompt=question", "--format", "text"
    )
    assert code == 1
    assert "rows.jsonl:17" in out
    (header,) = server.fake.asked("UploadDataset")
    assert (header.dataset_id, dict(header.field_mapping)) == ("desk", {"prompt": "question"})
    assert header.format == dataset_pb2.DATASET_FORMAT_TEXT
    code, out, _ = cli("datasets", "upload", str(rows), "--json")
    assert (code, json.loads(out)["row_errors"][0]["line_number"]) == (1, 17)
    assert "rows.jsonl:17" in cli("datasets", "get", "desk")[1]
    code, _, err = cli("datasets", "upload", str(tmp_path / "nothing.jsonl"))
    assert (code, "is not a file" in err) == (1, True)


def test_preview_marks_what_is_learned(server, cli):
    server.fake.preview = dataset_pb2.PreviewDatasetResponse(
        rows=[
            dataset_pb2.PreviewRow(
                line_number=1,
                tokens=[
                    dataset_pb2.PreviewToken(text="Hi"),
                    dataset_pb2.PreviewToken(text=" you", in_loss=True),
                    dataset_pb2.PreviewToken(text="!", in_loss=True),
                    dataset_pb2.PreviewToken(text="[x]"),
                ],
            ),
            dataset_pb2.PreviewRow(row_index=1, fields=row(prompt="plain", completion="text")),
        ],
        row_count=2,
    )
    code, out, _ = cli("datasets", "preview", "desk", "--base", "tiny", "-n", "2")
    assert code == 0
    assert "Hi⟦ you!⟧[x]" in out
    assert "4 tokens, 2 learned" in out
    assert "completion: text" in out
    lines = [json.loads(line) for line in cli("datasets", "preview", "desk", "--json")[1].splitlines()]
    assert lines[0]["tokens"][1] == {"token_id": 0, "text": " you", "in_loss": True}
    assert lines[1]["fields"] == {"prompt": "plain", "completion": "text"}


def test_datasets_list_and_delete(server, cli):
    assert [json.loads(line)["name"] for line in cli("datasets", "list", "--json")[1].splitlines()] == [
        "datasets/desk-1",
        "datasets/desk-2",
        "datasets/desk-3",
    ]
    assert "desk-2" in cli("datasets", "list")[1]
    assert "desk is deleted" in cli("datasets", "delete", "desk")[1]
    server.fake.failures.append(Failure(code=grpc.StatusCode.FAILED_PRECONDITION, reason="WRONG_STATE"))
    code, _, err = cli("datasets", "delete", "desk")
    assert (code, "WRONG_STATE" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "x"], "Missing option '--base'"),
        (["jobs", "watch", "j1", "--after-sequence", "-1"], "--after-sequence"),
        (["datasets", "upload", "x", "--map", "y"], "FIELD=NAME_IN_THE_FILE"),
        (["compare", "hi"], "Missing option '--adapters'"),
        (["compare", "hi", "--adapters", " , "], "names no adapter"),
        (["serve", "chat", "--json"], "--log-format json"),
        (["nonsense"], "No such command"),
    ],
)
def test_wrong_usage_is_one_line(server, cli, arguments, said):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error ")
    assert err.count("\n") == 1
