"""What a version must fulfil before an alias moves to it. Decided here and nowhere else; pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from slipstream_server.errors import GateClosed, InvalidField

MAX_CONDITIONS = 64
MAX_METRIC_NAME_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricCondition:
    """A bound on one figure: ``threshold`` the worst allowed, ``max_regression`` how much worse than now."""

    metric: str
    lower_is_better: bool = False
    threshold: float | None = None
    max_regression: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.metric) <= MAX_METRIC_NAME_CHARS:
            raise InvalidField.of("gate.conditions.metric", f"must have 1 to {MAX_METRIC_NAME_CHARS} characters")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise InvalidField.of("gate.conditions.threshold", f"{self.threshold} is not finite")
        if self.max_regression is not None and not (math.isfinite(self.max_regression) and self.max_regression >= 0):
            raise InvalidField.of("gate.conditions.max_regression", f"{self.max_regression} is not a number from 0 on")

    def check(self, candidate: Mapping[str, float], current: Mapping[str, float]) -> None:
        """Raises GateClosed where the figure is missing, beyond the threshold, or too much worse than now."""
        if self.metric not in candidate:
            raise _closed(f"the version has no figure {self.metric!r}", condition="metric", metric=self.metric)
        value = candidate[self.metric]
        if self.threshold is not None and self._worse_by(value, self.threshold) > 0:
            raise _closed(
                f"{self.metric} is {value:g}, where {self.threshold:g} or {self._better} is asked for",
                condition="threshold", metric=self.metric, value=repr(value), threshold=repr(self.threshold),
            )  # fmt: skip
        if self.max_regression is None or self.metric not in current:
            return
        before = current[self.metric]
        if self._worse_by(value, before) > self.max_regression:
            raise _closed(
                f"{self.metric} is {value:g}, worse by more than {self.max_regression:g} than the {before:g} of the"
                " version in place",
                condition="max_regression", metric=self.metric, value=repr(value), current=repr(before),
                max_regression=repr(self.max_regression),
            )  # fmt: skip

    @property
    def _better(self) -> str:
        return "less" if self.lower_is_better else "more"

    def _worse_by(self, value: float, reference: float) -> float:
        return value - reference if self.lower_is_better else reference - value


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasGate:
    """All conditions are asked, in their order; ``verified_only`` first."""

    conditions: tuple[MetricCondition, ...] = ()
    verified_only: bool = False

    def __post_init__(self) -> None:
        if len(self.conditions) > MAX_CONDITIONS:
            raise InvalidField.of("gate.conditions", f"{len(self.conditions)} conditions; at most {MAX_CONDITIONS}")

    @property
    def is_empty(self) -> bool:
        return not self.conditions and not self.verified_only

    def check(self, candidate: Mapping[str, float], current: Mapping[str, float], *, is_verified: bool) -> None:
        """Raises GateClosed naming the first condition that fails. ``current``: figures of the version in place."""
        if self.verified_only and not is_verified:
            raise _closed("only verified versions may pass", condition="verified_only")
        for condition in self.conditions:
            condition.check(candidate, current)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AliasGate:
        values = json.loads(text)
        conditions = tuple(MetricCondition(**condition) for condition in values["conditions"])
        return cls(conditions=conditions, verified_only=values["verified_only"])


def _closed(why: str, **metadata: str) -> GateClosed:
    return GateClosed(f"the gate of the alias is closed: {why}", metadata=metadata)
