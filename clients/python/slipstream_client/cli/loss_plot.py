"""The loss curve as text for a terminal, drawn by plotext.

plotext has one figure for the whole process: draw from one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import plotext
from rich.text import Text

Point = tuple[int, float]
LOSS_STYLE, HELD_OUT_STYLE, FRAME_STYLE = "cyan", "yellow", "bright_black"
_THEME = "slipstream"
MAX_TICKS = 6


@functools.cache
def _prepare() -> None:
    """The house's colours without a background, and any size; the caller knows how large the terminal is."""
    plotext.add_theme(_THEME, text="gray", sequence=["cyan", "orange"])
    plotext.terminal.limit(False, False)


def loss_plot(losses: Sequence[Point], held_out: Sequence[Point], *, width: int, height: int) -> Text:
    """Training loss as a line, held-out loss as dots joined by a line, over the steps; at least one point is needed."""
    _prepare()
    figure = plotext.figure
    figure.clear.all()
    figure.theme(_THEME)
    figure.plot_size(width, height)
    for points, marker in ((losses, "braille"), (held_out, "•")):
        if points:
            figure.draw(_signal(points, marker))
    figure.axes(False, side=1)
    steps = [step for step, _ in (*losses, *held_out)]
    figure.ruler("x").ticks(_whole_ticks(min(steps), max(steps)))
    return Text.from_ansi(str(figure.build()).rstrip())


def _signal(points: Sequence[Point], marker: str) -> object:
    signal = plotext.figure.signal([step for step, _ in points], [loss for _, loss in points], marker=marker)
    if marker == "braille":
        signal.lines()
    return signal


def _whole_ticks(first: int, last: int) -> list[int]:
    """Whole steps at equal distances, at most MAX_TICKS of them."""
    distance = max(1, -(-(last - first) // (MAX_TICKS - 1)))
    return list(range(first, last + 1, distance))
