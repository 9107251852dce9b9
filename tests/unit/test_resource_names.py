"""Resource names: what is one, what is none, and what the message says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.errors import InvalidField
from slipstream_server.resource_names import (
    AdapterAliasName,
    AdapterName,
    AdapterVersionName,
    CheckpointName,
    ConversationName,
    DatasetName,
    MessageName,
    ModelName,
    TrainingJobName,
    check_alias,
    check_id,
    check_step,
    check_version,
    new_id,
    parse_adapter_reference,
)

GOOD_IDS = ["a", "0", "ab", "a-b", "a--b", "7b", "smollm2-135m", "v1x", "x" * 63, "a" + "-" * 61 + "b"]
BAD_IDS = [
    "",
    "-",
    "-a",
    "a-",
    "A",
    "a_b",
    "a.b",
    "a b",
    " a",
    "a\n",
    "\na",
    "a\0b",
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "..%2f",
    "%61",
    "a/b",
    "a\\b",
    "a@b",
    "x" * 64,
    "x" * 4096,
    "аdapter",  # Cyrillic a
    "ａ",  # full width
    "①",
    "a\u200bb",
    "a\u0301",
    "²",
    "٣",  # a digit, but not 0-9
    "\u202ea",
    "\ud800",
    "ı",
    "K",  # the Kelvin sign, which lower-cases to k
]


@pytest.mark.parametrize("value", GOOD_IDS)
def test_an_id_is_accepted(value: str) -> None:
    assert check_id(value, "model_id") == value


@pytest.mark.parametrize("value", BAD_IDS, ids=ascii)
def test_what_is_no_id_is_refused_naming_field_value_and_rule(value: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_id(value, "model_id")
    assert caught.value.violations[0].field == "model_id"
    assert ascii(value[:80])[:-1] in caught.value.message
    assert "1 to 63 of a-z, 0-9 and '-'" in caught.value.message
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 1200


NAMES = [
    ("models/smollm2", ModelName("smollm2")),
    ("adapters/support", AdapterName("support")),
    ("adapters/support/versions/v12", AdapterVersionName("support", "v12")),
    ("adapters/support/aliases/live", AdapterAliasName("support", "live")),
    ("conversations/c1", ConversationName("c1")),
    ("conversations/c1/messages/m2", MessageName("c1", "m2")),
    ("trainingJobs/j1", TrainingJobName("j1")),
    ("trainingJobs/j1/checkpoints/500", CheckpointName("j1", "500")),
    ("datasets/d1", DatasetName("d1")),
]


@pytest.mark.parametrize(("text", "name"), NAMES)
def test_a_name_is_taken_apart_and_put_together(text: str, name: object) -> None:
    assert type(name).parse(text, "name") == name
    assert str(name) == text


@pytest.mark.parametrize("bad", BAD_IDS, ids=ascii)
@pytest.mark.parametrize(("text", "name"), NAMES)
def test_a_bad_id_anywhere_in_a_name_is_refused(text: str, name: object, bad: str) -> None:
    segments = text.split("/")
    for at in range(1, len(segments), 2):
        broken = "/".join([*segments[:at], bad, *segments[at + 1 :]])
        with pytest.raises(InvalidField, match="name"):
            type(name).parse(broken, "name")


@pytest.mark.parametrize(("text", "name"), NAMES)
def test_another_form_is_refused_and_the_right_one_named(text: str, name: object) -> None:
    for broken in (f"/{text}", f"{text}/", f"{text}/x/y", text.upper(), text.partition("/")[2], f"//{text}", ""):
        with pytest.raises(InvalidField, match=r"is not of the form|is no "):
            type(name).parse(broken, "name")


@pytest.mark.parametrize("value", ["v1", "v9", "v10", "v999999999"])
def test_a_version_is_accepted_and_is_no_alias(value: str) -> None:
    assert check_version(value, "version") == value
    with pytest.raises(InvalidField, match="looks like a version"):
        check_alias(value, "alias_id")


@pytest.mark.parametrize(
    "value", ["v0", "v01", "v", "V1", "1", "v1.0", "v-1", "v1\n", "v²", "v٣", "v1234567890", "", "live"]
)
def test_what_is_no_version_is_refused(value: str) -> None:
    with pytest.raises(InvalidField, match="no version"):
        check_version(value, "version")


@pytest.mark.parametrize("value", ["v0", "v01", "v1234567890"])
def test_what_only_looks_like_a_version_is_no_alias_either(value: str) -> None:
    with pytest.raises(InvalidField, match="looks like a version"):
        check_alias(value, "alias_id")


@pytest.mark.parametrize("value", ["live", "candidate", "v", "v1-rc", "version-1"])
def test_an_alias_is_accepted(value: str) -> None:
    assert check_alias(value, "alias_id") == value


@pytest.mark.parametrize("value", ["-1", "01", "1.0", "1e3", "", "٣", "nan", "9" * 19, " 1"])
def test_what_is_no_step_is_refused(value: str) -> None:
    with pytest.raises(InvalidField, match="no checkpoint"):
        check_step(value, "step")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("support", AdapterAliasName("support", "live")),
        ("support@live", AdapterAliasName("support", "live")),
        ("support@candidate", AdapterAliasName("support", "candidate")),
        ("support@v3", AdapterVersionName("support", "v3")),
        ("v3@v3", AdapterVersionName("v3", "v3")),
        ("adapters/support", AdapterAliasName("support", "live")),
        ("adapters/support/aliases/candidate", AdapterAliasName("support", "candidate")),
        ("adapters/support/versions/v3", AdapterVersionName("support", "v3")),
    ],
)
def test_short_and_full_references_mean_a_version_or_an_alias(text: str, expected: object) -> None:
    assert parse_adapter_reference(text, "adapter") == expected


@pytest.mark.parametrize(
    "text",
    [
        *BAD_IDS[:1],
        "@",
        "@live",
        "support@",
        "support@v0",
        "support@v01",
        "support@Live",
        "support@live@v3",
        "support@live/x",
        "support@../x",
        "support\0",
        "adapters/",
        "adapters/support@live",
        "adapters/support/versions/live",
        "adapters/support/aliases/v3",
        "adapters/support/other/x",
        "adapters/support/versions",
        "models/support",
        "org/adapter",
        "x" * 4096,
        "x@" * 2000,
        "/" * 4096,
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_bad_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_adapter_reference(text, "adapter")
    assert caught.value.violations[0].field == "adapter"


@given(st.text(max_size=300))
def test_any_text_is_a_name_or_an_invalid_field(text: str) -> None:
    for parse in (parse_adapter_reference, ModelName.parse, MessageName.parse, CheckpointName.parse):
        try:
            name = parse(text, "field")
        except InvalidField:
            continue
        assert all(check_id(part, "part") for part in str(name).split("/")[1::2])


def test_new_ids_are_ids_and_differ() -> None:
    ids = {new_id("job") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(check_id(value, "id").startswith("job-") for value in ids)
