"""From a task's parameters to the settings of a generation, as the pipelines of Transformers 4.57 settled them.

Precedence: the caller, then the model's task_specific_params, then the pipeline's own defaults (four beams, 256 new
tokens; a max_length of the generation_config's own beats the latter), then the generation_config. What the caller gives
is honoured where version 4 dropped it (``max_length`` beside the pipeline's 256). Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slipstream_server.errors import InvalidField, UnsupportedField
from slipstream_server.tasks.generation_models import WritingModel
from slipstream_server.tasks.generation_specs import DEFAULT_MAX_NEW_TOKENS, DEFAULT_NUM_BEAMS
from slipstream_server.tasks.registry import NamedTask

_SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "seed",
)
_BEAMS = ("length_penalty", "early_stopping")
_FLAGS = frozenset({"do_sample", "early_stopping"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How to write: values by the names of the contract's options; what is not there is the model's own.

    ``max_new_tokens`` is a default that gives way to the context where ``has_default_length``; ``max_length`` counts
    the prompt too, and stands in its place.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    beams: Mapping[str, Any] = field(default_factory=dict)
    num_return_sequences: int = 1
    max_new_tokens: int | None = None
    max_length: int | None = None
    has_default_length: bool = False
    min_new_tokens: int | None = None
    stop: tuple[str, ...] = ()


def settings_of(
    task: NamedTask, parameters: Mapping[str, Any], own: Mapping[str, Any], model: WritingModel
) -> GenerationSettings:
    """The settings of one call; ``own`` are the model's parameters for the task. Raises InvalidField and the like."""
    if not parameters["return_text"]:
        raise UnsupportedField.of("parameters.return_text", "false is not available; the text always comes")
    if parameters["return_tensors"] and not parameters["return_token_ids"]:
        parameters = {**parameters, "return_token_ids": True}
    wanted = {name: _first(parameters[name], _own(own, name)) for name in (*_SAMPLING, *_BEAMS)}
    num_beams = _num_beams(parameters, own, model, samples=bool(wanted["do_sample"]))
    beams = {name: wanted[name] for name in _BEAMS}
    if num_beams == 1:  # the model's own advice on beams is moot; the caller's is refused where it is looked at
        beams = {name: parameters[name] for name in _BEAMS}
    length = _length(parameters, own, model)
    return GenerationSettings(
        sampling={name: wanted[name] for name in _SAMPLING},
        beams={"num_beams": num_beams, **beams},
        num_return_sequences=parameters["num_return_sequences"],
        min_new_tokens=_least(parameters, own, model, length.get("max_new_tokens")),
        stop=(parameters["stop_sequence"],) if parameters["stop_sequence"] else (),
        **length,
    )


def _num_beams(
    parameters: Mapping[str, Any], own: Mapping[str, Any], model: WritingModel, *, samples: bool
) -> int | None:
    if parameters["num_beams"] is not None:
        return int(parameters["num_beams"])
    if samples:
        return 1
    found: int | None = _own(own, "num_beams")
    return found if found is not None else DEFAULT_NUM_BEAMS if model.is_encoder_decoder else None


def _length(parameters: Mapping[str, Any], own: Mapping[str, Any], model: WritingModel) -> dict[str, Any]:
    tokens, length = parameters["max_new_tokens"], parameters["max_length"]
    if tokens is not None and length is not None:
        raise InvalidField.of("parameters.max_length", "is version 4's max_new_tokens; set one of them")
    if tokens is not None:
        return {"max_new_tokens": tokens}
    if length is None and (own_tokens := _own(own, "max_new_tokens")):
        return {"max_new_tokens": own_tokens, "has_default_length": True}
    if length is not None:
        return _counted(length, model)
    if model.max_length is not None:
        counted = _counted(_first(_own(own, "max_length"), model.max_length), model)
        return {**counted, "has_default_length": True}
    return {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "has_default_length": True}


def _counted(length: int, model: WritingModel) -> dict[str, Any]:
    """Version 4's max_length, as new tokens where the rest is known."""
    if model.is_encoder_decoder:
        return {"max_new_tokens": max(1, length - model.num_start_tokens)}
    return {"max_length": length}


def _least(parameters: Mapping[str, Any], own: Mapping[str, Any], model: WritingModel, most: int | None) -> int | None:
    if parameters["min_new_tokens"] is not None:
        return int(parameters["min_new_tokens"])
    if parameters["min_length"] is not None:
        return _without_start(parameters["min_length"], model)
    least: int | None = _own(own, "min_new_tokens")
    if least is None and (length := _own(own, "min_length")) is not None:
        least = _without_start(length, model)
    return least if least is None or most is None else min(least, most)


def _without_start(length: int, model: WritingModel) -> int:
    return max(0, length - model.num_start_tokens)


def _own(own: Mapping[str, Any], name: str) -> Any:
    """A value of the model's configuration, where it is of the right kind: it is not to be trusted."""
    value = own.get(name)
    if name in _FLAGS:
        return value if isinstance(value, bool) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
