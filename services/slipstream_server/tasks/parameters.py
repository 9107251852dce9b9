"""Parameters of a task: what a caller gave, checked against the task's own list, with every default filled in.

Callers of Transformers' pipelines bring arguments that are about the process which runs the model. Those that change
nothing in a result are accepted; those that a request cannot decide are refused by name. Pure functions; any thread.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from slipstream_server.errors import InvalidField, UnknownParameter, UnsupportedField
from slipstream_server.ranges import spelt, spelt_range
from slipstream_server.tasks.specs import Parameter, ParameterType, TaskSpec

MAX_PARAMETERS = 64
MAX_TEXT_CHARS = 4096
MAX_LIST_ITEMS = 1024
_MAX_INT = 2**53

_CHOSEN_AT_LOAD = "Refused: {} is chosen when a model is loaded (LoadModel, or `slipstream up`), not by a request."
_PROCESS_PARAMETERS = (
    Parameter(
        name="batch_size",
        description="Accepted and without effect: inputs of all calls are batched together, as the model's limits say.",
        type=ParameterType.INT,
        min_value=1,
    ),
    Parameter(
        name="num_workers",
        description="Accepted and without effect: the service prepares inputs on threads of its own.",
        type=ParameterType.INT,
        min_value=0,
    ),
    Parameter(
        name="framework",
        description="Accepted and without effect: models run on PyTorch.",
        type=ParameterType.STRING,
        allowed_values=("pt",),
    ),
)
_REFUSED: Mapping[str, tuple[ParameterType, str]] = {
    "device": (ParameterType.STRING, _CHOSEN_AT_LOAD.format("where it runs")),
    "device_map": (ParameterType.STRING, _CHOSEN_AT_LOAD.format("how it is spread over devices")),
    "dtype": (ParameterType.STRING, _CHOSEN_AT_LOAD.format("the type of its numbers")),
    "torch_dtype": (ParameterType.STRING, _CHOSEN_AT_LOAD.format("the type of its numbers, dtype in version 5,")),
    "load_in_8bit": (ParameterType.BOOL, _CHOSEN_AT_LOAD.format("quantization")),
    "load_in_4bit": (ParameterType.BOOL, _CHOSEN_AT_LOAD.format("quantization")),
    "quantization_config": (ParameterType.STRUCT, _CHOSEN_AT_LOAD.format("quantization")),
    "model_kwargs": (ParameterType.STRUCT, _CHOSEN_AT_LOAD.format("how it is loaded")),
    "revision": (ParameterType.STRING, _CHOSEN_AT_LOAD.format("its revision")),
    "model": (ParameterType.STRING, "Refused as a parameter: the request's field `model` names the model."),
    "tokenizer": (ParameterType.STRING, "Refused: a model is served with its own tokenizer."),
    "trust_remote_code": (ParameterType.BOOL, "Refused: code that comes with a model is never run."),
}


def described_parameters(spec: TaskSpec) -> tuple[Parameter, ...]:
    """Every parameter that a caller may think of, by name: the task's own, and those about the process."""
    own = {parameter.name: parameter for parameter in spec.parameters}
    others = [*_PROCESS_PARAMETERS, *(Parameter(name=n, description=d, type=t) for n, (t, d) in _REFUSED.items())]
    for parameter in others:
        own.setdefault(parameter.name, parameter)
    return tuple(own[name] for name in sorted(own))


def check_parameters(spec: TaskSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with every default of the task; null counts as not given.

    Raises UnknownParameter, UnsupportedField or InvalidField.
    """
    if len(values) > MAX_PARAMETERS:
        raise InvalidField.of("parameters", f"has {len(values)} entries; at most {MAX_PARAMETERS}")
    known = {parameter.name: parameter for parameter in spec.parameters}
    given = {name: value for name, value in values.items() if value is not None}
    process = {parameter.name: parameter for parameter in _PROCESS_PARAMETERS if parameter.name not in known}
    for name, value in given.items():
        if name in known or name in process:
            given[name] = _checked(known.get(name) or process[name], value)
        else:
            _refuse(spec, name)
    for parameter in spec.parameters:
        if parameter.required and parameter.name not in given:
            raise InvalidField.of(f"parameters.{parameter.name}", f"is required by {spec.id}")
        given.setdefault(parameter.name, copy.copy(parameter.default))
    return {name: value for name, value in given.items() if name in known}


def _refuse(spec: TaskSpec, name: str) -> None:
    if name in _REFUSED:
        raise UnsupportedField.of(f"parameters.{name}", _REFUSED[name][1])
    near = difflib.get_close_matches(name[:100], [parameter.name for parameter in spec.parameters], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"DescribeTask lists those of {spec.id}"
    raise UnknownParameter.of(f"parameters.{name[:80]}", f"{spec.id} has no such parameter; {hint}")


def _checked(parameter: Parameter, value: Any) -> Any:
    field = f"parameters.{parameter.name}"
    made = _READERS[parameter.type](field, value)
    if isinstance(made, int | float) and not isinstance(made, bool):
        _check_range(field, parameter, made)
    if isinstance(made, str) and parameter.allowed_values and made not in parameter.allowed_values:
        raise InvalidField.of(field, f"{made[:80]!r} is not one of {', '.join(parameter.allowed_values)}")
    return made


def _check_range(field: str, parameter: Parameter, value: float) -> None:
    low, high = parameter.min_value, parameter.max_value
    if (low is not None and value < low) or (high is not None and value > high):
        raise InvalidField.of(field, f"{spelt(value)} is outside the allowed range, {spelt_range(low, high)}")


def _bool(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(field, value, "true or false")
    return value


def _int(field: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(field, value, "a number without a fraction")
    if abs(value) > _MAX_INT:
        raise InvalidField.of(field, f"{float(value):g} is not from -2^53 to 2^53")
    return value


def _float(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(field, value, "a finite number")
    return float(value)


def _string(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(field, value, "a string")
    if len(value) > MAX_TEXT_CHARS:
        raise InvalidField.of(field, f"has {len(value)} characters; at most {MAX_TEXT_CHARS}")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidField.of(field, "holds NUL or a lone surrogate")
    return value


def _list_of(read: Callable[[str, Any], Any]) -> Callable[[str, Any], list[Any]]:
    def read_all(field: str, value: Any) -> list[Any]:
        items = value if isinstance(value, list) else [value]
        if len(items) > MAX_LIST_ITEMS:
            raise InvalidField.of(field, f"has {len(items)} entries; at most {MAX_LIST_ITEMS}")
        return [read(f"{field}[{place}]", item) for place, item in enumerate(items)]

    return read_all


def _struct(field: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(field, value, "an object")
    return value


def _wrong(field: str, value: Any, wanted: str) -> InvalidField:
    return InvalidField.of(field, f"{str(value)[:80]!r} is not {wanted}")


_READERS: Mapping[ParameterType, Callable[[str, Any], Any]] = {
    ParameterType.BOOL: _bool,
    ParameterType.INT: _int,
    ParameterType.FLOAT: _float,
    ParameterType.STRING: _string,
    ParameterType.STRING_LIST: _list_of(_string),
    ParameterType.INT_LIST: _list_of(_int),
    ParameterType.STRUCT: _struct,
}
