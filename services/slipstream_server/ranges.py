"""Numbers and ranges as messages spell them, whoever refuses a value. Pure functions; any thread."""

from __future__ import annotations

_MOST_SPELT_OUT = 2**53


def spelt(number: float) -> str:
    """A number as people write it: 1048576, not 1.04858e+06."""
    is_whole = abs(number) <= _MOST_SPELT_OUT and float(number).is_integer()
    return f"{number:.0f}" if is_whole else f"{number:g}"


def spelt_range(low: float | None, high: float | None) -> str:
    """What lies from ``low`` to ``high``, both included; None is no end."""
    if low is not None and high is not None:
        return f"{spelt(low)} to {spelt(high)}"
    if low is not None:
        return f"{spelt(low)} or more"
    return f"{spelt(high)} or less" if high is not None else "any value"
