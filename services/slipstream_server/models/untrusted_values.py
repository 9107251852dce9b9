"""Values of a JSON file that a stranger wrote, each read as what it must be. Pure; any thread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slipstream_server.errors import CorruptArtifact

_MAX_COUNT = 2**53


class UntrustedValues:
    """Typed access to a JSON object whose values are not to be trusted; what is of another type is CorruptArtifact."""

    def __init__(self, values: Mapping[str, Any], file: str = "config.json") -> None:
        self.values = values
        self._file = file

    def text(self, key: str) -> str:
        value = self.values.get(key, "")
        if not isinstance(value, str) or len(value) > 200:
            raise self._bad(key, "a short text")
        return value

    def count(self, *keys: str) -> int | None:
        """The first of ``keys`` that is set; a count of at least 0."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, list) and all(type(each) is int and 0 <= each <= _MAX_COUNT for each in value):
                continue  # one for each stage, as vision models have it
            if value is not None:
                if isinstance(value, float) and value.is_integer():
                    value = int(value)
                if type(value) is not int or not 0 <= value <= _MAX_COUNT:
                    raise self._bad(key, "a count")
                return value
        return None

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._bad(key, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them; negative ids, by which some configurations say "none", are left out."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > 1024 or any(type(item) is not int or item > _MAX_COUNT for item in ids):
            raise self._bad(key, "token ids")
        return tuple(item for item in ids if item >= 0)

    def _bad(self, key: str, expected: str) -> CorruptArtifact:
        return CorruptArtifact(f"{self._file}: {key} is {str(self.values.get(key))[:60]!r}, which is not {expected}")
