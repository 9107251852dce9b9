"""The loss curve as text for a terminal, drawn by plotext.

plotext has one figure for the whole process: draw from one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from slipstream_client.cli.job_story import Point

LOSS_STYLE, HELD_OUT_STYLE = "cyan", "yellow"
_THEME = "slipstream"
MAX_TICKS = 6


@functools.cache
def _plotter() -> Any:
    """plotext in the house's colours, without a background, and in any size: the caller knows the terminal.

    Imported at its first use: it costs a fifth of a second, which no other command should wait for.
    """
    import plotext

    plotext.add_theme(_THEME, text="gray", sequence=["cyan", "orange"])
    plotext.terminal.limit(False, False)
    return plotext.figure


def loss_plot(losses: Sequence[Point], held_out: Sequence[Point], *, width: int, height: int) -> Text:
    """Training loss as a line, held-out loss as dots, over the steps; at least one point is needed."""
    figure = _plotter()
    figure.clear.all()
    figure.theme(_THEME)
    figure.plot_size(width, height)
    for points, marker in ((losses, "braille"), (held_out, "•")):
        if points:
            figure.draw(_signal(figure, points, marker))
    figure.axes(False, side=1)
    steps = [step for step, _ in (*losses, *held_out)]
    figure.ruler("x").ticks(_whole_ticks(min(steps), max(steps)))
    return Text.from_ansi(str(figure.build()).rstrip())


def _signal(figure: Any, points: Sequence[Point], marker: str) -> object:
    signal = figure.signal([step for step, _ in points], [loss for _, loss in points], marker=marker)
    if marker == "braille":
        signal.lines()
    return signal


def _whole_ticks(first: int, last: int) -> list[int]:
    """Whole steps at equal distances, at most MAX_TICKS of them."""
    distance = max(1, -(-(last - first) // (MAX_TICKS - 1)))
    return list(range(first, last + 1, distance))
