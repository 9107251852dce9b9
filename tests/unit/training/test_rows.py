"""Rows: what is accepted, what is refused and how it is reported."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.training.rows import (
    CompletionRow,
    ConversationRow,
    Message,
    RowError,
    RowErrorReason,
    RowFormat,
    RowLimits,
    canonical_bytes,
    check_rows,
    read_rows,
)

GOOD = b'{"prompt":"a","completion":"b"}'


def items(*lines: bytes, limits: RowLimits | None = None) -> list[object]:
    return list(read_rows(io.BytesIO(b"\n".join(lines)), limits))


def sole_error(line: bytes) -> RowError:
    (item,) = items(line)
    assert isinstance(item, RowError)
    return item


def test_conversations_are_read_in_order() -> None:
    turns = [("system", "s"), ("user", "ü"), ("assistant", "b")]
    line = json.dumps({"messages": [{"content": content, "role": role} for role, content in turns]})
    (row,) = items(line.encode())
    expected = tuple(Message(role=role, content=content) for role, content in turns)
    assert row == ConversationRow(line=1, messages=expected)


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b'{"prompt":"\xff","completion":"b"}', "", "INVALID_UTF8"),
        (b'{"prompt":"a"', "", "INVALID_JSON"),
        (b'{"prompt":NaN,"completion":"b"}', "prompt", "WRONG_TYPE"),
        (b"[" * 100_000, "", "INVALID_JSON"),
        (b'{"prompt":' + b"1" * 10_000 + b',"completion":"b"}', "", "INVALID_JSON"),
        (b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD, "", "INVALID_JSON"),
        (b'["a"]', "", "NOT_AN_OBJECT"),
        (b'{"prompt":"a","prompt":"c","completion":"b"}', "prompt", "DUPLICATE_KEY"),
        (b'{"messages":[{"role":"user","role":"user","content":"b"}]}', "role", "DUPLICATE_KEY"),
        (b'{"prompt":"a","completion":"b","weight":1}', "weight", "UNKNOWN_KEY"),
        (b'{"messages":[{"role":"user","content":"a","name":"x"}]}', "messages[0].name", "UNKNOWN_KEY"),
        (b'{"messages":[],"prompt":"a"}', "prompt", "UNKNOWN_KEY"),
        (b'{"text":"a"}', "", "MISSING_KEY"),
        (b'{"prompt":"a"}', "completion", "MISSING_KEY"),
        (b'{"messages":[{"role":"user"}]}', "messages[0].content", "MISSING_KEY"),
        (b'{"prompt":1,"completion":"b"}', "prompt", "WRONG_TYPE"),
        (b'{"messages":{"role":"user"}}', "messages", "WRONG_TYPE"),
        (b'{"messages":["hi"]}', "messages[0]", "WRONG_TYPE"),
        (b'{"messages":[{"role":"user","content":["x"]}]}', "messages[0].content", "WRONG_TYPE"),
        (b'{"prompt":"a\\u0000","completion":"b"}', "prompt", "FORBIDDEN_CHARACTER"),
        (b'{"prompt":"a\0","completion":"b"}', "", "FORBIDDEN_CHARACTER"),
        (b'{"prompt":"a","completion":"\\ud800"}', "completion", "FORBIDDEN_CHARACTER"),
        (b'{"prompt":"a","completion":" \\n"}', "completion", "EMPTY_TEXT"),
        (b'{"messages":[{"role":"bot","content":"a"}]}', "messages[0].role", "UNKNOWN_ROLE"),
        (b'{"messages":[]}', "messages", "MISPLACED_ROLE"),
        (b'{"messages":[{"role":"assistant","content":"a"}]}', "messages", "MISPLACED_ROLE"),
        (
            b'{"messages":[{"role":"assistant","content":"a"},{"role":"user","content":"b"}]}',
            "messages[1].role",
            "MISPLACED_ROLE",
        ),
        (
            b'{"messages":[{"role":"user","content":"a"},{"role":"system","content":"a"},'
            b'{"role":"assistant","content":"b"}]}',
            "messages[1].role",
            "MISPLACED_ROLE",
        ),
    ],
)
def test_faulty_rows_are_named_by_field_and_reason(line: bytes, field: str, reason: str) -> None:
    error = sole_error(line)
    assert (error.line, error.field, error.reason) == (1, field, reason)


def test_byte_order_mark_blank_lines_and_crlf_keep_line_numbers() -> None:
    rows = items(b"\xef\xbb\xbf" + GOOD + b"\r", b"", b" \t\r", GOOD)
    assert [row.line for row in rows if isinstance(row, CompletionRow)] == [1, 4]
    assert len(rows) == 2


def test_row_of_exactly_the_limit_is_read_and_one_byte_more_is_refused() -> None:
    limits = RowLimits(max_row_bytes=len(GOOD))
    after_mark, long, next_row = items(b"\xef\xbb\xbf" + GOOD + b"\r", GOOD + b" " * 100_000, GOOD, limits=limits)
    assert isinstance(after_mark, CompletionRow)
    assert isinstance(long, RowError)
    assert (long.line, long.reason) == (2, RowErrorReason.ROW_TOO_LONG)
    assert next_row == CompletionRow(line=3, prompt="a", completion="b")


def test_first_valid_row_decides_the_format() -> None:
    other = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}'
    report = check_rows(io.BytesIO(b"\n".join([b"{}", GOOD, other, GOOD])))
    assert report.row_format is RowFormat.PROMPT_COMPLETION
    assert [(error.line, error.reason) for error in report.errors] == [
        (1, RowErrorReason.MISSING_KEY),
        (3, RowErrorReason.MIXED_FORMATS),
    ]
    assert (report.num_rows, report.num_valid_rows, report.num_characters) == (4, 2, 4)


def test_too_many_rows_end_the_reading() -> None:
    report = check_rows(io.BytesIO(b"\n".join([GOOD] * 10)), RowLimits(max_rows=3))
    assert (report.num_rows, report.errors[0].reason, report.errors[0].line) == (3, RowErrorReason.TOO_MANY_ROWS, 4)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_file_without_rows_is_an_error(content: bytes) -> None:
    report = check_rows(io.BytesIO(content))
    assert (report.num_rows, [error.reason for error in report.errors]) == (0, [RowErrorReason.NO_ROWS])


def test_errors_are_counted_beyond_those_kept() -> None:
    report = check_rows(io.BytesIO(b"{}\n" * 50 + b"[]\n" * 7), max_errors=5)
    assert (len(report.errors), report.num_errors, report.is_valid) == (5, 57, False)
    assert report.errors_by_reason == {RowErrorReason.MISSING_KEY: 50, RowErrorReason.NOT_AN_OBJECT: 7}


def test_messages_of_a_row_are_bounded() -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "a"}] * 6}).encode()
    (error,) = items(line, limits=RowLimits(max_messages=5))
    assert isinstance(error, RowError)
    assert error.reason is RowErrorReason.TOO_MANY_MESSAGES


def test_equal_rows_have_equal_canonical_bytes_however_they_were_written() -> None:
    first, second = items(b'{"prompt": "\\u00fc", "completion":"b"}', '{"completion":"b","prompt":"ü"}'.encode())
    assert isinstance(first, CompletionRow)
    assert isinstance(second, CompletionRow)
    assert canonical_bytes(first) == canonical_bytes(second) == '{"completion":"b","prompt":"ü"}'.encode()


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_bytes_give_rows_or_errors_with_rising_lines(lines: list[bytes]) -> None:
    found = [item for item in read_rows(io.BytesIO(b"\n".join(lines))) if isinstance(item, RowError)]
    assert [error.line for error in found] == sorted(error.line for error in found)


text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=5))
def test_written_rows_come_back(pairs: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"prompt": prompt, "completion": completion}).encode() for prompt, completion in pairs]
    rows = [row for row in items(*lines) if isinstance(row, CompletionRow)]
    assert [(row.prompt, row.completion) for row in rows] == pairs
