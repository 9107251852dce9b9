"""Log lines: JSON with the request's id where nobody looks on, text at a terminal."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from slipstream_server.logs import configure_logging, request_id, unforeseen


@pytest.fixture(autouse=True)
def _root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_record_is_one_json_object_with_the_request_id() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    token = request_id.set("abc")
    try:
        logging.getLogger("room").warning("two\nlines of %s", "text", extra={"model": "m"})
    finally:
        request_id.reset(token)
    logging.getLogger("room").info("outside")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("WARNING", "room", "two\nlines of text")
    assert (first["request_id"], first["model"]) == ("abc", "m")
    assert first["time"].endswith("Z")
    assert "request_id" not in second


def test_a_traceback_stays_on_its_line() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("room").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_text_where_a_person_reads() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    configure_logging(stream=stream, level="warning")
    logging.getLogger("room").info("hidden")
    logging.getLogger("room").error("shown")
    assert stream.getvalue().endswith("ERROR   room: shown\n")
    assert "hidden" not in stream.getvalue()


def test_what_nobody_foresaw_is_found_in_the_log_by_the_id_that_the_asker_learns() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream)
    first, second = (unforeseen(KeyError(secret), "counting") for secret in ("zxfirst", "zxsecond"))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    for error, line, secret in zip((first, second), lines, ("zxfirst", "zxsecond"), strict=True):
        assert error.metadata["error_id"] in error.message
        assert error.metadata["error_id"] in line["message"]
        assert secret in line["exception"]
        assert secret not in error.message
    assert first.metadata != second.metadata
