"""The command line against real gRPC services: what goes to stdout, and how it exits."""

import io
import json
import subprocess
import sys

import grpc
import pytest
from tests.unit.client.fake_services import Failure, ServerThread

from slipstream.inference.v1 import model_service_pb2 as model_pb2
from slipstream_client.cli import main


@pytest.fixture
def server(monkeypatch):
    with ServerThread() as running:
        for service in ("INFERENCE", "CHAT", "TRAINING"):
            monkeypatch.setenv(f"SLIPSTREAM_{service}_ADDRESS", running.address)
        monkeypatch.setenv("SLIPSTREAM_ADAPTERS_ADDRESS", "127.0.0.1:1")
        yield running


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process; (exit code, stdout, stderr)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slipstream", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def test_generate_writes_only_the_text(server, cli):
    assert cli("generate", "Hi") == (0, "Hello there!\n", "")


def test_generate_sends_every_option(server, cli):
    code, _, _ = cli(
        "generate", "Hi", "--greedy", "-t", "0.5", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.1",
        "--typical-p", "0.8", "--repetition-penalty", "1.1", "--presence-penalty", "0.2", "--frequency-penalty", "0.3",
        "--no-repeat-ngram-size", "4", "--seed", "7", "--logit-bias", "5=-1.5", "-n", "9", "--min-new-tokens", "2",
        "--stop", "a", "--stop", "b", "--stop-token-id", "11", "--ignore-eos", "--priority", "high", "--model", "m",
        "--adapter", "support@live", "--echo", "--include-stop", "--special-tokens", "--num-beams", "2",
        "--length-penalty", "0.5", "--early-stopping", "--choice", "x", "--choice", "y", "--logprobs", "2",
    )  # fmt: skip
    assert code == 0
    request = server.fake.seen[0].request
    sampling, stopping, response = request.sampling, request.stopping, request.response
    assert not sampling.do_sample
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.9, 0.1)
    assert (sampling.typical_p, sampling.repetition_penalty, sampling.presence_penalty) == (0.8, 1.1, 0.2)
    assert (sampling.frequency_penalty, sampling.no_repeat_ngram_size, sampling.seed) == (0.3, 4, 7)
    assert dict(sampling.logit_bias) == {5: -1.5}
    assert (stopping.max_new_tokens, stopping.min_new_tokens, stopping.ignore_eos) == (9, 2, True)
    assert (list(stopping.stop), list(stopping.stop_token_ids)) == (["a", "b"], [11])
    assert (request.model, request.adapter, request.num_beams) == ("m", "support@live", 2)
    assert (response.echo, response.include_stop, response.skip_special_tokens, response.logprobs) == (
        True,
        True,
        False,
        2,
    )
    assert (request.beam.length_penalty, request.beam.early_stopping) == (0.5, True)
    assert list(request.constraint.choice.choices) == ["x", "y"]


def test_generate_json_is_one_object_a_line(server, cli):
    code, out, _ = cli("generate", "Hi", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert "".join(line["text"] for line in lines[:-1]) == "Hello there!"
    assert lines[-1]["event"] == "finished"
    assert lines[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "cached_prompt_tokens": 2}
    code, out, _ = cli("generate", "Hi", "--json", "--no-stream")
    assert json.loads(out)["completions"][0]["matched_stop"] == "!"


def test_prompt_from_stdin_and_through_the_chat_template(server, cli):
    assert cli("generate", "--system", "Be brief", stdin="from a pipe\n")[0] == 0
    messages = server.fake.seen[0].request.chat.messages
    assert [message.content for message in messages] == ["Be brief", "from a pipe"]


def test_several_sequences_come_whole(server, cli):
    assert cli("generate", "Hi", "--num-return-sequences", "2")[1] == "Hello there!\n" * 2


def test_a_failure_is_one_line_with_reason_and_request(server, cli):
    server.fake.failures.append(
        Failure(code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_FIELD", message="sampling.top_p: 7 is above 1")
    )
    code, out, err = cli("generate", "Hi", "--top-p", "7")
    assert (code, out) == (1, "")
    request_id = server.fake.seen[0].metadata["x-request-id"]
    assert err == f"error sampling.top_p: 7 is above 1 (reason INVALID_FIELD, request {request_id})\n"


def test_a_missing_server_says_how_to_start_one(cli, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_ADDRESS", "127.0.0.1:1")
    code, _, err = cli("generate", "Hi")
    assert code == 1
    assert "the inference service does not answer at 127.0.0.1:1" in err
    assert "slipstream up" in err


@pytest.mark.parametrize(
    "arguments", [["generate", "Hi", "--top-k", "many"], ["nonsense"], ["chat", "--json"], ["generate", "--no-such"]]
)
def test_wrong_usage_exits_with_2(server, cli, arguments):
    assert cli(*arguments)[0] == 2


def test_status_tells_each_service_and_the_default_model(server, cli):
    code, out, _ = cli("status", "--json")
    overview = json.loads(out)
    states = {service["service"]: service["state"] for service in overview["services"]}
    assert code == 0
    assert states == {"inference": "serving", "chat": "serving", "training": "serving", "adapters": "unreachable"}
    assert overview["default_model"] == "models/tiny"
    code, out, _ = cli("status")
    assert "tiny ★" in out
    assert "not running" in out


def test_status_of_nothing_exits_with_1(cli, monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_ADDRESS", "127.0.0.1:1")
    assert cli("status")[0] == 1


def test_models_list_and_get(server, cli):
    server.fake.models.append(model_pb2.Model(name="models/other", state=model_pb2.Model.STATE_FAILED))
    listed = [json.loads(line) for line in cli("models", "list", "--json")[1].splitlines()]
    assert [(model["name"], model["state"]) for model in listed] == [
        ("models/tiny", "ready"),
        ("models/other", "failed"),
    ]
    assert "2048 tokens" in cli("models", "get", "tiny")[1]
    code, _, err = cli("models", "get", "nope")
    assert code == 1
    assert "MODEL_NOT_FOUND" in err


def test_tokenize_and_count(server, cli):
    assert cli("tokenize", "ab")[1] == "0\t'a'\n1\t'b'\n"
    assert json.loads(cli("tokenize", "ab", "--json")[1])["tokens"][1]["token"] == "b"
    assert cli("count-tokens", "ab", "--chat")[1] == "11\n"
    assert json.loads(cli("count-tokens", "--json", stdin="x")[1])["context_tokens"] == 2048


def test_chat_without_a_terminal_takes_a_line_for_a_turn(server, cli, tmp_path):
    file = tmp_path / "chat.json"
    script = f"/system Be brief\nFirst\n/set temperature 0.7\nSecond\n/undo\nThird\n/save {file}\n/nonsense\n/stats\n"
    code, out, err = cli("chat", "-n", "9", stdin=script)
    assert code == 0
    assert out == "Hello there!\n" * 3
    streams = [seen.request for seen in server.fake.seen if seen.method == "StreamComplete"]
    said = [[message.content for message in request.messages] for request in streams]
    assert said == [
        ["Be brief", "First"],
        ["Be brief", "First", "Hello there!", "Second"],
        ["Be brief", "First", "Hello there!", "Third"],
    ]
    assert not streams[0].options.sampling.HasField("temperature")
    assert streams[1].options.sampling.temperature == 0.7
    assert streams[1].options.stopping.max_new_tokens == 9
    assert "there is no /nonsense" in err
    assert "this chat takes 11 of 2048 tokens" in err
    assert [message["content"] for message in json.loads(file.read_text())["messages"]][-1] == "Hello there!"
    assert cli("chat", "--load", str(file), stdin="Fourth\n/exit\nnever said\n")[1] == "Hello there!\n"
    assert len(server.fake.seen[-1].request.messages) == 6


def test_chat_retry_asks_the_same_again(server, cli):
    cli("chat", stdin="First\n/retry\n/model tiny\n/adapter support\n/retry\n")
    first, again, last = (seen.request for seen in server.fake.seen if seen.method == "StreamComplete")
    assert first == again
    assert (last.model, last.adapter) == ("tiny", "support")
    assert [message.content for message in last.messages] == ["First"]


def test_chat_script_ends_at_the_first_failure(server, cli):
    server.fake.failures.append(Failure(code=grpc.StatusCode.NOT_FOUND, reason="MODEL_NOT_FOUND", message="no model"))
    code, _, err = cli("chat", stdin="First\nSecond\n")
    assert code == 1
    assert "no model" in err
    assert len([seen for seen in server.fake.seen if seen.method == "StreamComplete"]) == 1


def test_bad_settings_leave_the_old_ones(server, cli):
    _, _, err = cli("chat", stdin="/set temperature hot\n/set colour red\n/set\nHi\n")
    assert "sampling.temperature: 'hot'" in err
    assert "colour: no such option" in err
    assert not server.fake.seen[-1].request.options.HasField("sampling")


def test_server_verbs_without_a_server_say_what_to_install(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "slipstream_server.cli", None)
    for verb in (["up"], ["serve", "inference"], ["models", "pull", "x"], ["config", "check"]):
        code, _, err = cli(*verb)
        assert code == 1
        assert "pip install 'slipstream[worker]'" in err


def test_client_verbs_import_no_server_and_no_torch():
    code = "import sys, slipstream_client.cli; print([m for m in ('slipstream_server', 'torch') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_interrupting_a_stream_exits_with_130_and_cancels_on_the_server(server):
    server.fake.hang_after_deltas = 1
    running = subprocess.Popen(
        [sys.executable, "-m", "slipstream_client.cli", "generate", "Hi", "--address", server.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert running.stdout.read(5) == b"Hello"
        running.send_signal(2)
        assert running.wait(20) == 130
        server.wait_cancelled()
        assert b"Traceback" not in running.stderr.read()
    finally:
        running.kill()
        running.wait()
