"""Reads instruction data: JSON Lines, one training row a line, every row checked, errors as data.

A file holds rows of one of two shapes, and only one of them:

    {"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

What is accepted and what is not:
- UTF-8. A byte order mark at the beginning of the file is skipped; anywhere else it is invalid JSON. Lines end with LF
  or CRLF, the last one may lack its end; lines of white space are skipped, but counted, so that line numbers are those
  an editor shows.
- Unknown keys are errors, because a key that is dropped silently changes what is trained; so are keys that appear
  twice.
- NUL and lone surrogates are errors wherever they stand: no tokenizer and no database takes them.
- Roles are system, user, assistant and tool. A system message stands first or nowhere; the last message is the
  assistant's and has at least one other before it. No text is empty or only white space.

Knows nothing of tokenizers, models or storage; the caller bounds the size of the file. Plain functions, blocking reads;
any thread.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, BinaryIO, NoReturn

ROLES = ("system", "user", "assistant", "tool")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowFormat(StrEnum):
    """The shape of a file's rows."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"


class RowErrorReason(StrEnum):
    """What is wrong with a row. The last three are found when a row is turned into tokens (``examples.py``)."""

    INVALID_UTF8 = "INVALID_UTF8"
    INVALID_JSON = "INVALID_JSON"
    NOT_AN_OBJECT = "NOT_AN_OBJECT"
    DUPLICATE_KEY = "DUPLICATE_KEY"
    UNKNOWN_KEY = "UNKNOWN_KEY"
    MISSING_KEY = "MISSING_KEY"
    WRONG_TYPE = "WRONG_TYPE"
    FORBIDDEN_CHARACTER = "FORBIDDEN_CHARACTER"
    EMPTY_TEXT = "EMPTY_TEXT"
    UNKNOWN_ROLE = "UNKNOWN_ROLE"
    MISPLACED_ROLE = "MISPLACED_ROLE"
    TOO_MANY_MESSAGES = "TOO_MANY_MESSAGES"
    MIXED_FORMATS = "MIXED_FORMATS"
    ROW_TOO_LONG = "ROW_TOO_LONG"
    TOO_MANY_ROWS = "TOO_MANY_ROWS"
    NO_ROWS = "NO_ROWS"
    TEMPLATE_REFUSED = "TEMPLATE_REFUSED"
    TEMPLATE_REWRITES_ANSWER = "TEMPLATE_REWRITES_ANSWER"
    NOTHING_TO_LEARN = "NOTHING_TO_LEARN"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """Bounds of a file. ``max_row_bytes`` is without the line's end."""

    max_row_bytes: int = 1024 * 1024
    max_rows: int = 1_000_000
    max_messages: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """One thing wrong with one row: its line (from 1), the field (``messages[2].role``; empty for the row as a whole),
    why.
    """

    line: int
    field: str
    reason: RowErrorReason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn, in the words of chat templates."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRow:
    """A chat whose assistant turns are to be learnt."""

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRow:
    """A prompt and the text to be learnt as its answer."""

    line: int
    prompt: str
    completion: str


Row = ConversationRow | CompletionRow


def canonical_bytes(row: Row) -> bytes:
    """The row as one JSON line without its number: equal rows give equal bytes, however they were written."""
    return json.dumps(_as_json(row), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def row_digest(row: Row) -> bytes:
    """SHA-256 of the canonical row, 32 bytes."""
    return hashlib.sha256(canonical_bytes(row)).digest()


def count_characters(row: Row) -> int:
    """Code points of all texts of the row."""
    if isinstance(row, ConversationRow):
        return sum(len(message.content) for message in row.messages)
    return len(row.prompt) + len(row.completion)


def read_rows(file: BinaryIO, limits: RowLimits | None = None) -> Iterator[Row | RowError]:
    """Every row of ``file`` in order, or what is wrong with it; ends after a TOO_MANY_ROWS, and with NO_ROWS where
    there is none.

    A row with several faults gives its first. Rows with faults count towards ``max_rows``.
    """
    limits = limits or RowLimits()
    file_format: RowFormat | None = None
    num_rows = 0
    for line, content in _lines(file, limits.max_row_bytes):
        num_rows += 1
        if num_rows > limits.max_rows:
            yield _error(line, "", RowErrorReason.TOO_MANY_ROWS, f"a file has at most {limits.max_rows} rows")
            return
        try:
            row = _parse(line, content, limits)
            found = _format_of(row)
            file_format = file_format or found
            if found is not file_format:
                _fail("", RowErrorReason.MIXED_FORMATS, f"a {found} row in a file that began with {file_format} rows")
            yield row
        except _Fault as fault:
            yield _error(line, fault.field, fault.reason, fault.message)
    if num_rows == 0:
        yield _error(0, "", RowErrorReason.NO_ROWS, "the file has no rows")


@dataclass(slots=True, kw_only=True)
class RowReport:
    """What a whole file holds: counts over all of it, the first errors in full."""

    row_format: RowFormat | None = None
    num_rows: int = 0
    num_valid_rows: int = 0
    num_characters: int = 0
    num_errors: int = 0
    errors: list[RowError] = field(default_factory=list)
    errors_by_reason: Counter[RowErrorReason] = field(default_factory=Counter)

    @property
    def is_valid(self) -> bool:
        return self.num_errors == 0

    def add_error(self, error: RowError, max_errors: int) -> None:
        """Count ``error``, and keep it while fewer than ``max_errors`` are kept."""
        self.num_errors += 1
        self.errors_by_reason[error.reason] += 1
        if len(self.errors) < max_errors:
            self.errors.append(error)


def check_rows(file: BinaryIO, limits: RowLimits | None = None, *, max_errors: int = 100) -> RowReport:
    """Read the whole of ``file``; keeps the first ``max_errors`` errors and counts all of them."""
    report = RowReport()
    for item in read_rows(file, limits):
        if isinstance(item, RowError):
            report.num_rows += item.reason not in _OF_THE_FILE
            report.add_error(item, max_errors)
        else:
            report.num_rows += 1
            report.num_valid_rows += 1
            report.num_characters += count_characters(item)
            report.row_format = report.row_format or _format_of(item)
    return report


_OF_THE_FILE = frozenset({RowErrorReason.TOO_MANY_ROWS, RowErrorReason.NO_ROWS})


class _Fault(Exception):
    """What is wrong with the row being parsed; never leaves this module."""

    def __init__(self, field: str, reason: RowErrorReason, message: str) -> None:
        super().__init__(message)
        self.field, self.reason, self.message = field, reason, message


def _fail(field: str, reason: RowErrorReason, message: str) -> NoReturn:
    raise _Fault(field, reason, message)


def _error(line: int, field: str, reason: RowErrorReason, message: str) -> RowError:
    return RowError(line=line, field=field, reason=reason, message=message)


def _lines(file: BinaryIO, max_row_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and content of every line that is not blank; None for one too long, which is never held in memory."""
    line = 0
    while raw := file.readline(max_row_bytes + 2):
        line += 1
        if line == 1 and raw.startswith(_BYTE_ORDER_MARK):
            raw = raw[len(_BYTE_ORDER_MARK) :] + (b"" if raw.endswith(b"\n") else file.readline(len(_BYTE_ORDER_MARK)))
        content = raw.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > max_row_bytes:
            while not raw.endswith(b"\n") and (raw := file.readline(max_row_bytes)):
                pass
            yield line, None
        elif content.strip(b" \t"):
            yield line, content


def _parse(line: int, content: bytes | None, limits: RowLimits) -> Row:
    if content is None:
        _fail("", RowErrorReason.ROW_TOO_LONG, f"the row is longer than {limits.max_row_bytes} bytes")
    value = _decode(content)
    if "messages" in value:
        _check_keys("", value, ("messages",))
        return ConversationRow(line=line, messages=_messages(value["messages"], limits))
    if "prompt" in value or "completion" in value:
        _check_keys("", value, ("prompt", "completion"))
        return CompletionRow(line=line, prompt=_text(value, "prompt"), completion=_text(value, "completion"))
    _fail("", RowErrorReason.MISSING_KEY, "a row has the key messages, or the keys prompt and completion")


def _decode(content: bytes) -> Mapping[str, Any]:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _Fault("", RowErrorReason.INVALID_UTF8, f"byte {error.start + 1} of the line is not UTF-8") from error
    if "\0" in text:
        _fail("", RowErrorReason.FORBIDDEN_CHARACTER, f"NUL at character {text.index(chr(0)) + 1} of the line")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        message = f"not JSON at character {error.pos + 1} of the line: {error.msg}"
        raise _Fault("", RowErrorReason.INVALID_JSON, message) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; nesting thousands deep
        raise _Fault(
            "", RowErrorReason.INVALID_JSON, "the line is nested too deeply or holds a number too long"
        ) from error
    if not isinstance(value, dict):
        _fail("", RowErrorReason.NOT_AN_OBJECT, f"a row is a JSON object, not {_json_type(value)}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _Fault(_shown(key), RowErrorReason.DUPLICATE_KEY, f"the key {_shown(key)!r} appears more than once")
    return value


def _messages(value: object, limits: RowLimits) -> tuple[Message, ...]:
    if not isinstance(value, list):
        _fail("messages", RowErrorReason.WRONG_TYPE, f"a list of messages, not {_json_type(value)}")
    if len(value) > limits.max_messages:
        message = f"{len(value)} messages; at most {limits.max_messages}"
        _fail("messages", RowErrorReason.TOO_MANY_MESSAGES, message)
    messages = tuple(_message(f"messages[{place}]", item) for place, item in enumerate(value))
    _check_order(messages)
    return messages


def _message(path: str, value: object) -> Message:
    if not isinstance(value, dict):
        _fail(path, RowErrorReason.WRONG_TYPE, f"an object with role and content, not {_json_type(value)}")
    _check_keys(f"{path}.", value, ("role", "content"))
    role = _text(value, "role", path=f"{path}.")
    if role not in ROLES:
        _fail(f"{path}.role", RowErrorReason.UNKNOWN_ROLE, f"{_shown(role)!r}; one of {', '.join(ROLES)}")
    return Message(role=role, content=_text(value, "content", path=f"{path}."))


def _check_order(messages: tuple[Message, ...]) -> None:
    if len(messages) < 2:
        _fail("messages", RowErrorReason.MISPLACED_ROLE, "at least one message and the assistant's answer to it")
    for place, later in enumerate(messages[1:], start=1):
        if later.role == "system":
            _fail(f"messages[{place}].role", RowErrorReason.MISPLACED_ROLE, "a system message stands first or nowhere")
    if messages[-1].role != "assistant":
        message = f"the last message is the assistant's, not of role {messages[-1].role}"
        _fail(f"messages[{len(messages) - 1}].role", RowErrorReason.MISPLACED_ROLE, message)


def _check_keys(path: str, value: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in value:
        if key not in keys:
            _fail(f"{path}{_shown(key)}", RowErrorReason.UNKNOWN_KEY, f"unknown key; allowed here: {', '.join(keys)}")
    for key in keys:
        if key not in value:
            _fail(f"{path}{key}", RowErrorReason.MISSING_KEY, "the key is missing")


def _text(value: Mapping[str, Any], key: str, path: str = "") -> str:
    text = value[key]
    if not isinstance(text, str):
        _fail(f"{path}{key}", RowErrorReason.WRONG_TYPE, f"a string, not {_json_type(text)}")
    if not text.strip():
        _fail(f"{path}{key}", RowErrorReason.EMPTY_TEXT, "is empty or only white space")
    if (place := text.find("\0")) >= 0:
        _fail(f"{path}{key}", RowErrorReason.FORBIDDEN_CHARACTER, f"NUL at character {place + 1}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"a lone surrogate at character {error.start + 1}"
        raise _Fault(f"{path}{key}", RowErrorReason.FORBIDDEN_CHARACTER, message) from error
    return text


def _shown(key: str) -> str:
    """A key or word of the file, made fit for a message."""
    return key[:40].encode("ascii", "backslashreplace").decode()


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _format_of(row: Row) -> RowFormat:
    return RowFormat.MESSAGES if isinstance(row, ConversationRow) else RowFormat.PROMPT_COMPLETION


def _as_json(row: Row) -> dict[str, Any]:
    if isinstance(row, ConversationRow):
        return {"messages": [{"role": message.role, "content": message.content} for message in row.messages]}
    return {"prompt": row.prompt, "completion": row.completion}
