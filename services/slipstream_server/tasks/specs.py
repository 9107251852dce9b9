"""What a task is: what it takes, what it gives, how it can be told to. Torch-free data; DescribeTask serves it.

Every task stands once, in the file of its kind (``text_specs``, ``generation_specs``, ``media_specs``); ``registry``
gathers them and finds a task by its id or alias.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal

Family = Literal["encoder", "decoder", "encoder_decoder"]
"""Architecture families, as the contract has them; the registry may know more (vision, audio, multimodal)."""


class ParameterType(StrEnum):
    """Type of a parameter's value as plain data."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"
    STRING = "string"
    STRING_LIST = "string_list"
    INT_LIST = "int_list"
    STRUCT = "struct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter. ``default`` None: none, which means what the description says; bounds are inclusive."""

    name: str
    description: str
    type: ParameterType
    default: Any = None
    min_value: float | None = None
    max_value: float | None = None
    allowed_values: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One task. ``id`` is Transformers' spelling.

    ``runs_by``: "generate" for tasks that the generation path answers (the front shapes prompt and answer), "worker"
    for those a task worker runs. ``packages``: distributions that must be importable beside the worker's own.
    ``auto_classes`` are tried in order; ``removed_in_transformers``: the release that dropped its own pipeline.
    """

    id: str
    description: str
    input_kinds: tuple[str, ...]
    result_kinds: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    auto_classes: tuple[str, ...]
    families: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    runs_by: Literal["worker", "generate"] = "worker"
    packages: tuple[str, ...] = ()
    adapters_supported: bool = False
    removed_in_transformers: str = ""


# The module that a distribution brings, where the two are not called alike.
_MODULES = {"pillow": "PIL"}


def missing_packages(spec: TaskSpec) -> tuple[str, ...]:
    """Packages that the task needs and this environment, which front and workers share, has not."""
    return tuple(name for name in spec.packages if not _is_installed(name))


@cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(_MODULES.get(package, package)) is not None
