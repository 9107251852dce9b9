"""Parameters: types, ranges, words, the unknown with the nearest known, and what is about the process."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from slipstream_server.errors import InvalidField, SlipstreamError, UnknownParameter, UnsupportedField
from slipstream_server.tasks.parameters import check_parameters, described_parameters
from slipstream_server.tasks.registry import TASKS, find_task, get_task
from slipstream_server.tasks.specs import Parameter, ParameterType, TaskSpec

SPEC = TaskSpec(
    id="trial",
    description="",
    input_kinds=("text",),
    result_kinds=("classification",),
    auto_classes=(),
    families=(),
    parameters=(
        Parameter(name="flag", description="", type=ParameterType.BOOL, default=False),
        Parameter(name="count", description="", type=ParameterType.INT, default=3, min_value=1, max_value=9),
        Parameter(name="share", description="", type=ParameterType.FLOAT, min_value=0.0),
        Parameter(name="word", description="", type=ParameterType.STRING, default="a", allowed_values=("a", "b")),
        Parameter(name="words", description="", type=ParameterType.STRING_LIST, default=["O"]),
        Parameter(name="ids", description="", type=ParameterType.INT_LIST),
        Parameter(name="more", description="", type=ParameterType.STRUCT),
        Parameter(name="needed", description="", type=ParameterType.STRING, required=True),
    ),
)


def test_defaults_are_filled_in_and_null_is_not_given() -> None:
    found = check_parameters(SPEC, {"needed": "x", "count": None})
    assert found == {
        "flag": False, "count": 3, "share": None, "word": "a", "words": ["O"], "ids": None, "more": None, "needed": "x",
    }  # fmt: skip
    found["words"].append("changed")
    assert check_parameters(SPEC, {"needed": "x"})["words"] == ["O"]


def test_values_take_the_type_of_the_parameter() -> None:
    given = {"needed": "x", "count": 4.0, "share": 1, "words": "one", "ids": [1.0, 2], "more": {"a": [1]}}
    found = check_parameters(SPEC, given)
    assert (found["count"], type(found["count"])) == (4, int)
    assert (found["share"], type(found["share"])) == (1.0, float)
    assert (found["words"], found["ids"], found["more"]) == (["one"], [1, 2], {"a": [1]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flag", 1), ("flag", "true"), ("count", 0), ("count", 10), ("count", 1.5), ("count", True), ("count", "4"),
        ("count", 2**60), ("share", -0.1), ("share", math.nan), ("share", math.inf), ("share", False), ("word", "c"),
        ("word", 1), ("word", "a\0"), ("words", [1]), ("words", ["\ud800"]), ("words", ["x"] * 1025), ("ids", [1.5]),
        ("more", []), ("needed", "x" * 5000),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        check_parameters(SPEC, {"needed": "x", name: value})
    assert caught.value.violations[0].field.startswith(f"parameters.{name}")


def test_numbers_are_spelt_as_people_write_them() -> None:
    spec = replace(SPEC, parameters=(Parameter(name="n", description="", type=ParameterType.INT, max_value=100_000),))
    for value, words in (
        (10**9, "1000000000 is outside the allowed range, 100000 or less"),
        (1e300, r"1e\+300 is not"),
    ):
        with pytest.raises(InvalidField, match=words):
            check_parameters(spec, {"n": value})


def test_what_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(InvalidField, match=r"parameters\.needed"):
        check_parameters(SPEC, {})
    with pytest.raises(UnknownParameter, match=r"did you mean 'count'"):
        check_parameters(SPEC, {"needed": "x", "counts": 3})
    with pytest.raises(InvalidField, match="at most 64"):
        check_parameters(SPEC, {f"p{number}": 1 for number in range(65)})


def test_arguments_about_the_process() -> None:
    assert check_parameters(SPEC, {"needed": "x", "batch_size": 8, "num_workers": 2}) == check_parameters(
        SPEC, {"needed": "x"}
    )
    with pytest.raises(InvalidField):
        check_parameters(SPEC, {"needed": "x", "batch_size": 0})
    for name in ("device", "torch_dtype", "load_in_8bit", "trust_remote_code"):
        with pytest.raises(UnsupportedField, match=name):
            check_parameters(SPEC, {"needed": "x", name: "auto"})


@pytest.mark.parametrize("spec", TASKS.values(), ids=TASKS)
def test_every_task_accepts_its_own_defaults(spec: TaskSpec) -> None:
    given = {parameter.name: parameter.default for parameter in spec.parameters}
    assert not any(parameter.required for parameter in spec.parameters)
    assert check_parameters(spec, given) == check_parameters(spec, {}) == given
    described = [parameter.name for parameter in described_parameters(spec)]
    assert described == sorted(described)
    assert {"batch_size", "device", *given} <= set(described)
    assert all(parameter.description for parameter in described_parameters(spec))


def test_tasks_are_found_by_id_alias_and_language_pair() -> None:
    assert find_task("ner").spec.id == "token-classification"
    assert find_task("translation").languages is None
    pair = find_task("translation_en_to_fr")
    assert (pair.spec.id, pair.languages) == ("translation", ("en", "fr"))
    with pytest.raises(InvalidField, match="did you mean 'summarization'"):
        find_task("summarisation")
    with pytest.raises(SlipstreamError, match="fill-mask"):
        get_task("fill_mask_")
