"""Markdown that comes in pieces."""

import io

import pytest
from rich.console import Console

from slipstream_client.cli.chat_view import GrowingMarkdown, split_finished

ANSWER = """First *paragraph*, long enough.

1. one
2. two

```python
def f():

    return 1
```

The **end**."""


@pytest.mark.parametrize(
    ("text", "finished", "growing"),
    [
        ("one line", "", "one line"),
        ("a\n\nb", "a\n\n", "b"),
        ("a\n\nb\n\nc", "a\n\nb\n\n", "c"),
        ("```\nx\n\ny", "", "```\nx\n\ny"),
        ("a\n\n```\nx\n\ny", "a\n\n", "```\nx\n\ny"),
        ("```\nx\n\ny\n```\n\nz", "```\nx\n\ny\n```\n\n", "z"),
    ],
)
def test_blocks_are_split_at_blank_lines_outside_code(text, finished, growing):
    assert split_finished(text) == (finished, growing)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_end_shows_everything_once_whatever_the_pieces(size):
    screen = io.StringIO()
    answer = GrowingMarkdown(Console(file=screen, width=60, height=20))  # no terminal: only what stays is written
    for start in range(0, len(ANSWER), size):
        answer.add(ANSWER[start : start + size])
    answer.finish()
    shown = [line.strip() for line in screen.getvalue().splitlines() if line.strip()]
    assert shown == ["First paragraph, long enough.", "1 one", "2 two", "def f():", "return 1", "The end."]
