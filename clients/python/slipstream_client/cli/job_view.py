"""A job while it runs, on a terminal: the news above, a progress bar, the figures and the loss curve below.

Elsewhere each piece of news is a line. Everything is drawn from the event loop's thread, but for the spinner.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from slipstream_client.cli import terminal
from slipstream_client.cli.job_lines import COLOURS, in_time, line_of
from slipstream_client.cli.job_story import JobStory
from slipstream_client.cli.loss_plot import HELD_OUT_STYLE, LOSS_STYLE, loss_plot
from slipstream_client.errors import SlipstreamClientError
from slipstream_client.job_events import JobEvent
from slipstream_client.jobs import FINAL_STATES

MAX_PLOT_WIDTH, PLOT_HEIGHT, MIN_TERMINAL_HEIGHT = 100, 12, 22
MIN_POINTS = 2
BAR_WIDTH = 40
# Drawing a curve costs milliseconds; a replay of a long job has thousands of events.
MIN_REDRAW_S = 0.1


class JobView:
    """The screen of one watched job."""

    def __init__(self) -> None:
        self.story = JobStory()
        self._lost = False
        self._last_drawn_s = 0.0
        self._live = Live(console=terminal.out, transient=False, refresh_per_second=8)
        self._spinner = Spinner("dots", style="dim")

    def __enter__(self) -> Self:
        if terminal.out.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if terminal.out.is_terminal:
            self._draw()
            self._live.stop()

    def take(self, event: JobEvent) -> None:
        """Show what an event changes."""
        self._lost = False
        self.story.take(event)
        line = line_of(event, with_metrics=not terminal.out.is_terminal)
        if line is not None:
            terminal.out.print(line)
        if time.monotonic() - self._last_drawn_s >= MIN_REDRAW_S:
            self._draw()

    def lost(self, error: SlipstreamClientError) -> None:
        """Say, once for each loss, that the connection is being opened again."""
        if not self._lost and terminal.out.is_terminal:
            terminal.out.print(Text(f"! {error}; the watch goes on when the service is back", "yellow"))
        elif not self._lost:
            terminal.warn(f"{error}; the watch goes on when the service is back")
        self._lost = True
        self._draw()

    def _draw(self) -> None:
        if terminal.out.is_terminal:
            self._last_drawn_s = time.monotonic()
            self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        story = self.story
        parts: list[RenderableType] = []
        if len(story.losses) + len(story.held_out) >= MIN_POINTS and terminal.out.height >= MIN_TERMINAL_HEIGHT:
            width = min(terminal.out.width, MAX_PLOT_WIDTH)
            parts.append(loss_plot(story.losses, story.held_out, width=width, height=PLOT_HEIGHT))
        if story.losses or story.held_out:
            parts.append(_figures(story))
        if story.state not in FINAL_STATES:
            parts.append(self._bar())
        return Group(*parts)

    def _bar(self) -> Table:
        story = self.story
        row = Table.grid(padding=(0, 1))
        state = "reconnecting" if self._lost else story.state or "waiting"
        cells: list[RenderableType] = [self._spinner, Text(state, "yellow" if self._lost else COLOURS.get(state, ""))]
        if story.is_evaluating:
            cells += [*_share(story.evaluated_rows, story.evaluation_rows, "rows evaluated")]
        elif story.total_steps and story.state == "running":
            cells += [*_share(story.step, story.total_steps, "steps")]
            if story.remaining_s is not None:
                cells.append(Text(f"{in_time(story.remaining_s)} left", "dim"))
        elif story.state_message:
            cells.append(Text(story.state_message, "dim"))
        row.add_row(*cells)
        return row


def _share(done: int, total: int, unit: str) -> tuple[ProgressBar, Text]:
    bar = ProgressBar(total=max(1, total), completed=done, width=BAR_WIDTH)
    return bar, Text(f"{done}/{total} {unit}" if total else unit)


def _figures(story: JobStory) -> Text:
    line = Text()
    if story.loss is not None:
        line.append("━ loss ", LOSS_STYLE).append(f"{story.loss:.4f}", "bold")
    if story.held_out:
        first, last = story.held_out[0][1], story.held_out[-1][1]
        shown = f"{last:.4f}" if len(story.held_out) == 1 else f"{first:.4f} → {last:.4f}"
        line.append("   • held-out loss ", HELD_OUT_STYLE).append(shown, "bold")
    more = [
        f"learning rate {story.learning_rate:.2e}" if story.learning_rate is not None else "",
        f"{story.tokens_per_second:.0f} tokens/s" if story.tokens_per_second else "",
        f"epoch {story.epoch:.2f}" if story.epoch else "",
        f"attempt {story.attempt}" if story.attempt > 1 else "",
    ]
    return line.append("   " + " · ".join(filter(None, more)), "dim")
