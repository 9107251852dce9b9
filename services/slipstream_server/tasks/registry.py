"""All tasks by id and alias. Pure data, torch-free; any thread."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from slipstream_server.errors import InvalidField, NotFound
from slipstream_server.tasks.generation_specs import GENERATION_TASKS
from slipstream_server.tasks.media_specs import MEDIA_SPECS
from slipstream_server.tasks.specs import TaskSpec
from slipstream_server.tasks.text_specs import TEXT_TASKS

TASKS: Mapping[str, TaskSpec] = {
    spec.id: spec for spec in sorted((*TEXT_TASKS, *GENERATION_TASKS, *MEDIA_SPECS), key=lambda spec: spec.id)
}
_LANGUAGE_PAIR = re.compile(r"translation_([A-Za-z_-]{2,16}?)_to_([A-Za-z_-]{2,16})")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTask:
    """A task as a request names it; ``languages`` of ``translation_en_to_fr``."""

    spec: TaskSpec
    languages: tuple[str, str] | None = None


def find_task(name: str, field: str = "task") -> NamedTask:
    """The task of an id, an alias, or ``translation_XX_to_YY``. Raises InvalidField with the nearest name."""
    if (found := _find(name)) is not None:
        return found
    if not name:
        raise InvalidField.of(field, "is not set; ListTasks names the tasks")
    raise InvalidField.of(field, _unknown(name))


def get_task(name: str) -> TaskSpec:
    """The task of an id or alias. Raises NotFound with the nearest name."""
    found = _find(name)
    if found is None:
        raise NotFound(f"task {_unknown(name)}")
    return found.spec


def _find(name: str) -> NamedTask | None:
    if (spec := _BY_NAME.get(name)) is not None:
        return NamedTask(spec=spec)
    if (pair := _LANGUAGE_PAIR.fullmatch(name)) is not None:
        return NamedTask(spec=TASKS["translation"], languages=(pair[1], pair[2]))
    return None


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name[:100].lower().replace("_", "-"), _BY_NAME, n=1, cutoff=0.4)
    return f"{name[:80]!r} is unknown; " + (f"did you mean {near[0]!r}?" if near else "ListTasks names the tasks")


def _by_name() -> dict[str, TaskSpec]:
    found = dict(TASKS)
    for spec in TASKS.values():
        for alias in spec.aliases:
            if alias in found:
                raise ValueError(f"two tasks are called {alias}")
            found[alias] = spec
    return found


_BY_NAME = _by_name()
