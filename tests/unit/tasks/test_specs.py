"""What the environment lacks for a task, against what the installed distributions themselves say."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import pytest

from slipstream_server.tasks.registry import TASKS
from slipstream_server.tasks.specs import TaskSpec, missing_packages


def is_distribution(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("spec", [spec for spec in TASKS.values() if spec.packages], ids=lambda spec: spec.id)
def test_a_package_is_missing_where_its_distribution_is(spec: TaskSpec) -> None:
    assert set(missing_packages(spec)) == {name for name in spec.packages if not is_distribution(name)}


def test_a_package_that_no_one_has_is_missing() -> None:
    spec = replace(TASKS["fill-mask"], packages=("pytest", "no_such_package"))
    assert missing_packages(spec) == ("no_such_package",)
