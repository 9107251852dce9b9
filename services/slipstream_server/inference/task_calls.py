"""A task call before it runs: which model answers, whether it can, and with what.

Torch-free; event loop. Knows the front's models by the two questions it asks of each: its facts and its engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slipstream_server.errors import (
    InvalidField,
    MissingDependency,
    ModelNotFound,
    SlipstreamError,
    UnsupportedField,
    WrongState,
)
from slipstream_server.models.catalogue import builtin_catalogue
from slipstream_server.models.facts import ModelFacts
from slipstream_server.models.load_options import LoadOptions
from slipstream_server.models.task_classes import head_of, tasks_of, tasks_when_loaded_for
from slipstream_server.tasks.registry import NamedTask, find_task
from slipstream_server.tasks.specs import TaskSpec, missing_packages


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCall:
    """One RunTask or StreamTask, without its inputs. ``deadline_monotonic_s``: on ``time.monotonic``'s clock."""

    task: str
    model: str = ""
    adapter: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    deadline_monotonic_s: float | None = None


def check_task(call: TaskCall) -> NamedTask:
    """The task of a call. Raises InvalidField, UnsupportedField or MissingDependency."""
    task = find_task(call.task)
    if call.adapter and not task.spec.adapters_supported:
        raise UnsupportedField.of("adapter", f"{task.spec.id} cannot apply adapters; leave it unset")
    if missing := missing_packages(task.spec):
        raise MissingDependency(
            f"{task.spec.id} needs {', '.join(missing)}, which this service lacks", metadata={"package": missing[0]}
        )
    return task


def served_tasks(facts: ModelFacts, load: LoadOptions) -> tuple[str, ...]:
    """What a model can do as it is loaded: by the head of the task it was loaded for, else by its own."""
    own = tasks_of(facts)
    return own if load.task is None or load.task in own else tasks_when_loaded_for(load.task)


def check_model(spec: TaskSpec, model: str, facts: ModelFacts, load: LoadOptions) -> None:
    """Raise WrongState where a model has not the head for a task."""
    able = served_tasks(facts, load)
    if spec.id in able:
        return
    head = head_of(facts)
    what = facts.architectures[0] if facts.architectures else facts.model_type
    can = f"it can do {', '.join(able)}" if able else "it can do no task that this service knows"
    needs = " or ".join(spec.auto_classes) or "another model"
    raise WrongState(
        f"model {model} is a {what[:80]}, which has not the head that {spec.id} needs ({needs}); {can}",
        metadata={"state": "NO_HEAD", "task": spec.id, "auto_class": head.auto_class if head else ""},
    )


def choose_model(
    spec: TaskSpec, *, configured: Mapping[str, str], default: str, able: Callable[[str], bool], known: Iterable[str]
) -> str:
    """The model of a request that names none: the task's configured one, the service's default where it can do the
    task, or the only one that can. Raises ModelNotFound.
    """
    if (name := configured.get(spec.id)) is not None:
        return name
    found = [name for name in known if able(name)]
    if default in found:
        return default
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(sorted(found)[:10])
        raise InvalidField.of("model", f"is not set, and several models can do {spec.id}: {names}")
    raise _nobody_can(spec)


def _nobody_can(spec: TaskSpec) -> SlipstreamError:
    names = proposed_models(spec)
    hint = "; " + " or ".join(f"`slipstream models load {name}`" for name in names) if names else ""
    metadata = {"task": spec.id, "proposed_models": ",".join(names)}
    return ModelNotFound(f"no model that is loaded can do {spec.id}{hint}", metadata=metadata)


def proposed_models(spec: TaskSpec) -> tuple[str, ...]:
    """Names of the catalogue's models to load for a task, in the order in which to try them: the usual choice, and
    where that one lies on a hub, one that does not.
    """
    entries = builtin_catalogue().of_task(spec.id)
    here = [
        entry for entry in entries[1:] if entries[0].needs_hub and not entry.needs_hub and entry.tasks[0] == spec.id
    ]
    return tuple(entry.name for entry in (*entries[:1], *here[:1]))
