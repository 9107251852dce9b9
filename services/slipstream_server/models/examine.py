"""Checks a configuration against the transformers class that it is for: ``python -m slipstream_server.models.examine``.

A subprocess (see ``tool_side``): reads what a stranger wrote, and needs the configuration classes of transformers,
which the front does not import. Torch is kept out, so that it answers within seconds. Nothing is allocated or loaded.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# transformers then offers its configurations alone, in a third of the time.
if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from slipstream_server.errors import InvalidField
from slipstream_server.models.architectures import ENDINGS, auto_class_of
from slipstream_server.models.config_checks import check_sizes
from slipstream_server.models.tool_side import answer

_MAX_DEPTH = 6
# Not of the architecture; or of a checkpoint that is not read.
_DROPPED = ("_name_or_path", "transformers_version", "quantization_config", "torch_dtype", "dtype")
# Written by older tools into configurations of every kind.
_TOLERATED = frozenset({"torch_dtype", "_name_or_path", "transformers_version", "gradient_checkpointing"})
# Said by a field of its own in the request.
_CHOSEN_ELSEWHERE = {"architectures": "auto_class", "torch_dtype": "data_type", "dtype": "data_type"}
_NAMED_FIELD = re.compile(r"Validation error for field '(\w{1,80})'")
_MAX_LABELS = 100_000
_DERIVED = {
    "num_hidden_layers": ("layer_types", "no_rope_layers", "mlp_layer_types"),
    "hidden_size": ("head_dim",),
    "num_attention_heads": ("head_dim",),
}


def examine(request: Mapping[str, Any]) -> dict[str, Any]:
    """``config``, ``overrides``, ``is_whole`` (every key of ``config`` is the caller's own), ``auto_class``."""
    base, overrides = dict(request["config"]), dict(request["overrides"])
    kind = _class_of(base.get("model_type"))
    if request["is_whole"]:
        _check_keys(kind, base, "config")
    _check_overrides(kind, overrides)
    place = "config" if request["is_whole"] and not overrides else "config_overrides"
    values = _typed(kind, _laid_over(kind, _without(base, _DROPPED), overrides))
    check_sizes(_with_defaults(kind, values), place)
    _check_activations(kind, values, place)
    config = _built(kind, values, place)
    _check_rotation(config, place)
    architecture = _architecture(config, base, request["auto_class"])
    config.architectures = [architecture]
    return {
        "config": _plain(config.to_dict()),
        "architecture": architecture,
        "auto_class": auto_class_of(architecture),
    }


def _class_of(model_type: Any) -> Any:
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        shown = ascii(str(model_type)[:60]) if model_type is not None else "nothing"
        raise InvalidField.of(
            "config.model_type",
            f"{shown} is no architecture of transformers {transformers.__version__}"
            f"{_nearest(str(model_type), CONFIG_MAPPING_NAMES)}",
        )
    return CONFIG_MAPPING[model_type]


def _check_overrides(kind: Any, overrides: Mapping[str, Any]) -> None:
    for key in _CHOSEN_ELSEWHERE.keys() & overrides.keys():
        raise InvalidField.of(f"config_overrides.{key}", f"is chosen by the field {_CHOSEN_ELSEWHERE[key]}")
    _check_keys(kind, overrides, "config_overrides")


def _check_keys(kind: Any, values: Mapping[str, Any], path: str, depth: int = _MAX_DEPTH) -> None:
    """Every key must be one that the class knows; parts of a composed configuration likewise."""
    known = _known_keys(kind)
    parts = getattr(kind, "sub_configs", None) or {}
    for key, value in values.items():
        if key not in known:
            raise InvalidField.of(f"{path}.{key[:80]}", f"{kind.model_type} has no such field{_nearest(key, known)}")
        if key in parts and isinstance(value, dict) and depth:
            part = _part_class(parts[key], value)
            if part is not None:
                _check_keys(part, value, f"{path}.{key}", depth - 1)


def _part_class(declared: Any, value: Mapping[str, Any]) -> Any:
    """The class of a part; one that is declared as "any" says so by its model_type."""
    if getattr(declared, "model_type", ""):
        return declared
    named = value.get("model_type")
    return CONFIG_MAPPING[named] if named in CONFIG_MAPPING_NAMES else None


def _known_keys(kind: Any) -> set[str]:
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return {
        *kind().to_dict(),
        *fields,
        *kind.attribute_map,
        *_TOLERATED,
        "model_type",
        "rope_theta",
        "rope_scaling",
        "num_labels",
    }


def _laid_over(kind: Any, base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` over ``base``, each under the name the class itself uses; what followed from an overridden value
    is left to follow again.
    """
    if overrides.get("model_type") not in (None, base.get("model_type")):
        raise InvalidField.of(
            "config_overrides.model_type", "cannot be changed; take the configuration of another model"
        )
    own = {kind.attribute_map.get(key, key): value for key, value in _with_labels(overrides).items()}
    values = {kind.attribute_map.get(key, key): value for key, value in _with_labels(base).items()}
    for key, followers in _DERIVED.items():
        if kind.attribute_map.get(key, key) in own:
            for follower in followers:
                if follower not in own and _followed(follower, values):
                    values.pop(follower, None)
    for key, value in own.items():
        old = values.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key.endswith("_config"):
            values[key] = {**old, **value}
        else:
            values[key] = value
    return values


def _with_labels(values: Mapping[str, Any]) -> dict[str, Any]:
    """A number of labels stands for as many names."""
    rest = {key: value for key, value in values.items() if key != "num_labels"}
    number = values.get("num_labels")
    if number is None or "id2label" in rest:
        return rest
    if isinstance(number, bool) or not isinstance(number, int | float) or number not in range(1, _MAX_LABELS + 1):
        raise InvalidField.of("config_overrides.num_labels", f"{number} is no whole number from 1 to {_MAX_LABELS}")
    names = {str(index): f"LABEL_{index}" for index in range(int(number))}
    return {**rest, "id2label": names, "label2id": {name: int(index) for index, name in names.items()}}


def _followed(follower: str, values: Mapping[str, Any]) -> bool:
    """A head's width that is not hidden / heads was chosen, and stays."""
    if follower != "head_dim":
        return True
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    return (
        isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and values.get("head_dim") == hidden // heads
    )


def _with_defaults(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """A head's width stands there only where it was chosen, by the caller or by the family itself."""
    defaults = kind().to_dict()
    derived = {"num_key_value_heads", *(["head_dim"] if _followed("head_dim", defaults) else [])}
    return {key: value for key, value in defaults.items() if key not in derived} | dict(values)


def _check_activations(kind: Any, values: Mapping[str, Any], path: str, depth: int = _MAX_DEPTH) -> None:
    """Where the class has the name of an activation function, another one must be a name that transformers has."""
    known, parts = _activations(), getattr(kind, "sub_configs", None) or {}
    defaults = kind().to_dict()
    for key, value in values.items():
        if known and "act" in key and defaults.get(key) in known and value not in known:
            raise InvalidField.of(
                f"{path}.{key}", f"{str(value)[:60]!a} is no activation function{_nearest(str(value), known)}"
            )
        if key in parts and isinstance(value, dict) and depth:
            part = _part_class(parts[key], value)
            if part is not None:
                _check_activations(part, value, f"{path}.{key}", depth - 1)


def _check_rotation(config: Any, path: str) -> None:
    """The kind of rotary positions must be one that transformers has; it takes any, and fails to build the model."""
    rotation = getattr(config, "rope_parameters", None)
    parts = [rotation, *rotation.values()] if isinstance(rotation, dict) else []
    for part in parts:
        kind = part.get("rope_type") if isinstance(part, dict) else None
        if kind is not None and not hasattr(config, f"_validate_{kind}_rope_parameters"):
            raise InvalidField.of(f"{path}.rope_parameters", f"{str(kind)[:60]!a} is no rope_type of transformers")


@cache
def _activations() -> tuple[str, ...]:
    """The names that transformers knows, read out of the source of a module that imports torch; none where it is no
    longer written so.
    """
    spec = importlib.util.find_spec("transformers.activations")
    if spec is None or spec.origin is None:
        return ()
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        if "ACT2CLS" in names and isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    return ()


def _built(kind: Any, values: Mapping[str, Any], place: str) -> Any:
    try:
        return kind.from_dict(dict(values))
    except Exception as error:  # whatever the class finds wrong, in its own words
        words = " ".join(str(error).split())
        named = _NAMED_FIELD.search(words)
        raise InvalidField.of(f"{place}.{named[1]}" if named else place, _tidied(words)[:300]) from error


def _tidied(words: str) -> str:
    """``Validation error for field 'x': TypeError: Field 'x' expected int, got str`` without the machinery."""
    return words.rpartition("Error: ")[2] or words


def _typed(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as the class wants them: a Struct has only doubles."""
    declared = {f.name: str(f.type) for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    defaults = kind().to_dict()
    return {key: _number(value, declared.get(key, ""), defaults.get(key)) for key, value in values.items()}


def _number(value: Any, declared: str, default: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        wants_float = ("float" in declared and "int" not in declared) or (not declared and isinstance(default, float))
        if wants_float:
            return float(value)
        return int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, list):
        return [_number(item, declared, None) for item in value]
    if isinstance(value, dict):
        inner = default if isinstance(default, dict) else {}
        return {key: _number(item, "", inner.get(key)) for key, item in value.items()}
    return value


def _architecture(config: Any, base: Mapping[str, Any], auto_class: str) -> str:
    """The class to build: by ``auto_class``, otherwise the first that the configuration names."""
    offered = set(dir(transformers))
    if not auto_class:
        named = base.get("architectures")
        if not isinstance(named, list) or not named:
            raise InvalidField.of("auto_class", "is needed: the configuration names no architecture")
        if named[0] not in offered or auto_class_of(str(named[0])) is None:
            raise InvalidField.of("auto_class", f"is needed: {str(named[0])[:80]!a} is no class that can be made")
        return str(named[0])
    stem = type(config).__name__.removesuffix("Config")
    for ending in ENDINGS[auto_class]:
        if f"{stem}{ending}" in offered:
            return f"{stem}{ending}"
    able = [name for name, endings in ENDINGS.items() if any(f"{stem}{ending}" in offered for ending in endings)]
    raise InvalidField.of("auto_class", f"{config.model_type} has no {auto_class}; it has {', '.join(able)}")


def _without(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, [str(key) for key in known], n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


if __name__ == "__main__":
    sys.exit(answer(examine))
