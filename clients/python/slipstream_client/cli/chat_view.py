"""An answer on the screen while it comes: finished paragraphs are printed for good, only the one that grows is drawn
anew.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import AsyncIterator
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from slipstream_client.cli import terminal
from slipstream_client.cli.chat_session import Turn
from slipstream_client.results import ChatDelta
from slipstream_client.streams import AnswerStream

FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
# Rows of the terminal that the growing paragraph leaves free.
MARGIN_ROWS = 3
CODE_THEME = "ansi_dark"


class Clock:
    """When an answer began, and when its first text came."""

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self.first_s: float | None = None

    async def watch(self, stream: AnswerStream[ChatDelta]) -> AsyncIterator[str]:
        """The texts of the stream."""
        async for delta in stream:
            if delta.text:
                self.first_s = self.first_s or time.perf_counter()
                yield delta.text

    def turn(self, stream: AnswerStream[ChatDelta]) -> Turn:
        """The turn, now that it has ended."""
        ended_s = time.perf_counter()
        first_s = self.first_s or ended_s
        return Turn(
            usage=stream.usage,
            first_s=first_s - self.began_s,
            decode_s=ended_s - first_s,
            finish_reason=str(stream.finish_reason),
            model=stream.model,
            adapter_version=stream.adapter_version,
        )


async def show_plain(stream: AnswerStream[ChatDelta]) -> Turn:
    """Write the text as it comes and nothing else: for pipes."""
    clock = Clock()
    try:
        async for text in clock.watch(stream):
            sys.stdout.write(text)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return clock.turn(stream)


async def show_rendered(stream: AnswerStream[ChatDelta]) -> Turn:
    """Draw the text as Markdown while it comes."""
    clock = Clock()
    answer = GrowingMarkdown(terminal.out)
    try:
        async for text in clock.watch(stream):
            answer.add(text)
    finally:
        answer.finish()
    return clock.turn(stream)


class GrowingMarkdown:
    """Markdown that comes in pieces.

    What stands above the last blank line outside a code block is printed and forgotten.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._growing = ""
        self._has_printed = False
        self._live = Live(
            Spinner("dots", Text("…", "dim")),
            console=console,
            transient=True,
            refresh_per_second=12,
            vertical_overflow="visible",
        )
        self._live.start()

    def add(self, text: str) -> None:
        """More text."""
        self._growing += text
        finished, self._growing = split_finished(self._growing)
        if finished:
            self._print(finished)
        rows = max(3, self._console.height - MARGIN_ROWS)
        self._live.update(_Bottom(self._block(self._growing or "…"), rows))

    def finish(self) -> None:
        """Print what is left; nothing more comes."""
        self._live.update(Text(""))
        self._live.stop()
        if self._growing.strip():
            self._print(self._growing)

    def _print(self, text: str) -> None:
        self._console.print(self._block(text), soft_wrap=False)
        self._has_printed = True

    def _block(self, text: str) -> RenderableType:
        return _Block(_Markdown(text.strip("\n"), code_theme=CODE_THEME), has_before=self._has_printed)


class _Block:
    """Markdown without the blank lines around it, and one before it that parts it from the block above."""

    def __init__(self, content: RenderableType, *, has_before: bool) -> None:
        self._content = content
        self._has_before = has_before

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        while lines and _is_blank(lines[0]):
            lines.pop(0)
        while lines and _is_blank(lines[-1]):
            lines.pop()
        if self._has_before and lines:
            yield Segment.line()
        for line in lines:
            yield from line
            yield Segment.line()


def _is_blank(line: list[Segment]) -> bool:
    return not any(segment.text.strip() for segment in line)


class _Heading(Heading):
    """Headings at the left, as in a book, not in a box in the middle."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold underline" if self.tag == "h1" else "bold")
        yield self.text


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _Heading}


class _Bottom:
    """The last rows of what does not fit."""

    def __init__(self, content: RenderableType, rows: int) -> None:
        self._content = content
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        for line in lines[-self._rows :]:
            yield from line
            yield Segment.line()


def split_finished(text: str) -> tuple[str, str]:
    """``text`` as (blocks that are complete, the one that may still grow)."""
    end = len(text)
    while (cut := text.rfind("\n\n", 0, end)) >= 0:
        if len(FENCE.findall(text, 0, cut)) % 2 == 0:
            return text[: cut + 2], text[cut + 2 :]
        end = cut + 1
    return "", text
