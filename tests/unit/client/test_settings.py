"""Where the client finds its services: arguments, then environment, then this machine."""

import pytest

from slipstream_client.errors import InvalidRequestError
from slipstream_client.settings import ClientSettings, addresses_from


def resolved(environ=None, **arguments):
    return ClientSettings.resolve(environ=environ or {}, **arguments)


def test_without_anything_it_is_this_machine():
    settings = resolved()
    assert settings.addresses == {
        "inference": "127.0.0.1:50051",
        "chat": "127.0.0.1:50052",
        "training": "127.0.0.1:50053",
        "adapters": "127.0.0.1:50054",
    }
    assert (settings.token, settings.tls) == ("", False)


@pytest.mark.parametrize(
    ("base", "inference", "adapters"),
    [
        ("gpu-box", "gpu-box:50051", "gpu-box:50054"),
        ("gpu-box:6000", "gpu-box:6000", "gpu-box:6003"),
        ("[::1]:6000", "[::1]:6000", "[::1]:6003"),
        ("[::1]", "[::1]:50051", "[::1]:50054"),
    ],
)
def test_services_follow_the_base_address(base, inference, adapters):
    found = addresses_from(base)
    assert (found["inference"], found["adapters"]) == (inference, adapters)


@pytest.mark.parametrize(
    "base", ["", ":50051", "box:0", "box:65533", "box:x", "::1:50051", "http://box:50051", "box:-1"]
)
def test_bad_base_addresses_are_refused_by_name(base):
    with pytest.raises(InvalidRequestError, match="address"):
        addresses_from(base)


def test_environment_of_one_service_beats_the_base():
    env = {"SLIPSTREAM_ADDRESS": "box:6000", "SLIPSTREAM_CHAT_ADDRESS": "talk:1"}
    assert resolved(env).addresses["chat"] == "talk:1"
    assert resolved(env).addresses["inference"] == "box:6000"


def test_an_address_argument_beats_the_environment():
    env = {"SLIPSTREAM_ADDRESS": "box:6000", "SLIPSTREAM_CHAT_ADDRESS": "talk:1"}
    settings = resolved(env, address="here:7000", adapters_address="store:9")
    assert settings.addresses["chat"] == "here:7001"
    assert settings.addresses["adapters"] == "store:9"


def test_token_from_a_file_and_its_precedence(tmp_path):
    file = tmp_path / "token"
    file.write_text("# ours\n\nfrom-file alice\nsecond bob\n")
    env = {"SLIPSTREAM_TOKEN_FILE": str(file)}
    assert resolved(env).token == "from-file"
    assert resolved(env | {"SLIPSTREAM_TOKEN": "from-env"}).token == "from-env"
    assert resolved(env, token="argument").token == "argument"


def test_a_bad_token_is_refused_without_being_shown():
    with pytest.raises(InvalidRequestError) as caught:
        resolved(token="very secret\nx: y")
    assert "secret" not in str(caught.value)
    assert "hidden" not in repr(resolved(token="hidden"))


def test_a_missing_token_file_is_named():
    with pytest.raises(InvalidRequestError, match="SLIPSTREAM_TOKEN_FILE"):
        resolved({"SLIPSTREAM_TOKEN_FILE": "/nowhere/token"})


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "86401"])
def test_bad_timeouts_are_refused(text):
    with pytest.raises(InvalidRequestError, match="SLIPSTREAM_TIMEOUT_S"):
        resolved({"SLIPSTREAM_TIMEOUT_S": text})


def test_a_certificate_authority_switches_tls_on():
    assert resolved({"SLIPSTREAM_CA_CERT": "ca.pem"}).tls
    assert resolved({"SLIPSTREAM_TLS": "true"}).tls
    assert not resolved({"SLIPSTREAM_TLS": "0"}).tls
