"""``slipstream adapters`` against the real service, and ``slipstream compare`` against a commanded one."""

import asyncio
import io
import json
import sys
import threading

import grpc
import pytest
from tests.rpc.adapters_kit import adapter_service
from tests.unit.adapters.lora_files import WEIGHTS, lora_files
from tests.unit.client.fake_services import Failure, ServerThread

from slipstream_client.adapter_results import AdapterAlias, AliasMove
from slipstream_client.cli import main
from slipstream_client.cli.adapter_view import print_move


@pytest.fixture
def adapters(monkeypatch, tmp_path):
    """The service on an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = adapter_service(tmp_path / "service", acknowledge_timeout_s=0.05)
    service = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(20)
    monkeypatch.setenv("SLIPSTREAM_ADAPTERS_ADDRESS", f"127.0.0.1:{service.port}")
    yield service
    asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def server(monkeypatch):
    with ServerThread() as running:
        monkeypatch.setenv("SLIPSTREAM_INFERENCE_ADDRESS", running.address)
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
def saved(tmp_path):
    """Make the folder of a saved adapter."""

    def make(seed):
        folder = tmp_path / f"adapter-{seed}"
        folder.mkdir()
        for name, data in lora_files(seed).items():
            (folder / name).write_bytes(data)
        return str(folder)

    return make


def test_upload_promote_roll_back_download(adapters, cli, saved, tmp_path):
    assert "desk@v1 registered" in cli("adapters", "upload", "desk", saved(1))[1]
    assert json.loads(cli("adapters", "upload", "desk", saved(2), "--json")[1])["name"] == "adapters/desk/versions/v2"
    assert "desk@live → v1 · generation 1" in cli("adapters", "promote", "desk", "v1", "--expected-generation", "0")[1]
    code, out, _ = cli("adapters", "promote", "desk", "v2", "--alias", "candidate", "--check-only")
    assert (code, "could be moved" in out) == (0, True)
    code, _, err = cli("adapters", "promote", "desk", "v2", "--expected-generation", "0")
    assert (code, "STALE_GENERATION" in err) == (1, True)
    cli("adapters", "promote", "desk", "v2", "--alias", "candidate")
    assert "desk@live → v2 was v1 · generation 2" in cli("adapters", "promote", "desk", "desk@candidate", "-m", "ok")[1]
    rolled = json.loads(cli("adapters", "rollback", "desk", "--json")[1])
    assert (rolled["alias"]["version"], rolled["alias"]["generation"]) == ("adapters/desk/versions/v1", 3)
    assert rolled["unconfirmed_replicas"] == []
    folder = tmp_path / "fetched"
    assert "desk@v1 is in" in cli("adapters", "download", "desk", str(folder))[1]
    assert (folder / WEIGHTS).read_bytes() == lora_files(1)[WEIGHTS]


def test_what_is_shown_of_adapters(adapters, cli, saved):
    assert "there are no adapters" in cli("adapters", "list")[2]
    for seed in (1, 2):
        cli("adapters", "upload", "desk", saved(seed))
    cli("adapters", "promote", "desk", "v1")
    line = cli("adapters", "list")[1].splitlines()[2]
    assert line.split()[:6] == ["desk", "live", "→", "v1", "v2", "2"]
    versions = cli("adapters", "versions", "desk")[1].splitlines()[2:]
    assert [line.split()[0] for line in versions] == ["v2", "v1"]
    assert "live" in versions[1]
    whole = json.loads(cli("adapters", "get", "desk", "--json")[1])
    assert [version["name"] for version in whole["versions"]] == [
        "adapters/desk/versions/v2",
        "adapters/desk/versions/v1",
    ]
    assert "live → v1" in cli("adapters", "get", "desk")[1]
    assert "rank 4 · alpha 8" in cli("adapters", "get", "desk@live")[1]
    assert json.loads(cli("adapters", "get", "desk@v2", "--json")[1])["lora"]["rank"] == 4


def test_delete_knows_what_is_meant(adapters, cli, saved):
    for seed in (1, 2):
        cli("adapters", "upload", "desk", saved(seed))
    cli("adapters", "promote", "desk", "v1")
    assert cli("adapters", "delete", "desk@v1")[0] == 1
    assert cli("adapters", "delete", "desk@live")[0] == 0
    assert "desk@v1 is deleted" in cli("adapters", "delete", "desk@v1")[1]
    assert cli("adapters", "delete", "desk")[0] == 1
    assert json.loads(cli("adapters", "delete", "desk", "--force", "--json")[1]) == {"deleted": "desk"}


def test_who_does_not_know_yet_is_said(capsys):
    alias = AdapterAlias(
        name="adapters/desk/aliases/live", version="adapters/desk/versions/v3", generation=4, history=(), gate=None,
        create_time=None, update_time=None, etag="",
    )  # fmt: skip
    print_move(AliasMove(alias=alias, unconfirmed_replicas=("front-1",)), "v2")
    shown = capsys.readouterr()
    assert "desk@live → v3 was v2" in shown.out
    assert "not confirmed yet by front-1" in shown.err


def test_compare_asks_everyone_the_same(server, cli, tmp_path):
    code, out, _ = cli("compare", "Hi", "--adapters", "base,desk@v1,desk@live", "-n", "5", "--system", "Be brief")
    assert code == 0
    asked = [seen.request for seen in server.fake.seen]
    assert sorted(request.adapter for request in asked) == ["", "desk@live", "desk@v1"]
    assert {request.chat.messages[1].content for request in asked} == {"Hi"}
    assert all(request.sampling.HasField("do_sample") and not request.sampling.do_sample for request in asked)
    assert all(request.stopping.max_new_tokens == 5 for request in asked)
    assert out.count("Hello there!") == 3
    # The version that answered is named where it is not what was asked for.
    assert "desk@live = support@v3" in out
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    code, out, _ = cli("compare", "--file", str(file), "--adapters", "base,desk", "--raw", "-t", "0.7", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["adapter"]) for line in lines] == [
        ("one", "base"),
        ("one", "desk"),
        ("two", "base"),
        ("two", "desk"),
    ]
    assert {seen.request.text for seen in server.fake.seen[3:]} == {"one", "two"}
    assert not server.fake.seen[-1].request.sampling.HasField("do_sample")


def test_a_failed_answer_leaves_the_others(server, cli):
    server.fake.failures.append(Failure(code=grpc.StatusCode.NOT_FOUND, reason="ALIAS_NOT_FOUND", message="no alias"))
    code, out, _ = cli("compare", "Hi", "--adapters", "desk@nope,base")
    assert code == 1
    assert "no alias" in out
    assert "Hello there!" in out


def test_compare_takes_its_adapters_in_one_place(server, cli):
    assert cli("compare", "Hi", "--adapters", "base", "--adapter", "desk")[0] == 2
    assert cli("compare", "Hi", "--adapters", "base", "--file", "x")[0] == 2
    assert server.fake.seen == []
