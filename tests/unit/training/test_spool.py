"""The spool: whole lines only, from any offset, whatever happened to the writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.training import spool
from slipstream_server.training.events import AnyEvent, Failed, Log, Progress, Stopped
from slipstream_server.training.spool import MAX_LINE_BYTES, SpoolWriter, read_spool

EVENTS: list[AnyEvent] = [Log(level="INFO", message=f"line {number} ü") for number in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with SpoolWriter(tmp_path / "events-1.jsonl") as writer:
        for event in EVENTS:
            writer.write(event)
    return tmp_path / "events-1.jsonl"


def test_events_come_back_as_they_were_written(path: Path) -> None:
    batch = read_spool(path, 0)
    assert (batch.events, batch.next_offset, batch.num_malformed) == (EVENTS, path.stat().st_size, 0)


def test_file_that_is_not_there_yet_has_no_events(tmp_path: Path) -> None:
    batch = read_spool(tmp_path / "none", 0)
    assert (list(batch.events), batch.next_offset) == ([], 0)


def test_half_a_line_is_never_read(path: Path) -> None:
    whole = path.read_bytes()
    last_start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last_start, len(whole)):
        path.write_bytes(whole[:cut])
        batch = read_spool(path, 0)
        assert (batch.events, batch.next_offset) == (EVENTS[:-1], last_start)
    path.write_bytes(whole)
    assert read_spool(path, last_start).events == EVENTS[-1:]


@given(sizes=st.lists(st.integers(1, 400), max_size=40))
def test_reader_that_overtakes_the_writer_gets_each_event_once(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The file grows by arbitrary pieces; the reader looks after each."""
    folder = tmp_path_factory.mktemp("spool")
    with SpoolWriter(folder / "whole") as writer:
        for event in EVENTS:
            writer.write(event)
    whole = (folder / "whole").read_bytes()
    growing, offset, found, end = folder / "growing", 0, [], 0
    for size in [*sizes, len(whole)]:
        end += size
        growing.write_bytes(whole[:end])
        batch = read_spool(growing, offset)
        found += batch.events
        offset = batch.next_offset
    assert found == EVENTS


def test_lines_that_are_no_events_are_counted_and_passed_over(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'\0\0\xff\n{"kind":"unheard_of"}\n\n')
    with SpoolWriter(path) as writer:
        writer.write(EVENTS[0])
    batch = read_spool(path, 0)
    assert (batch.events, batch.num_malformed) == ([*EVENTS, EVENTS[0]], 3)


def test_endless_line_does_not_stop_the_reader(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"x" * (3 * MAX_LINE_BYTES) + b"\n")
    with SpoolWriter(path) as writer:
        writer.write(EVENTS[0])
    offset, found = 0, []
    for _ in range(10):
        batch = read_spool(path, offset, max_bytes=MAX_LINE_BYTES)
        offset = batch.next_offset
        found += batch.events
    assert found == EVENTS[:1]


def test_small_reads_go_through_all_events(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MAX_LINE_BYTES", 100)
    offset, found = 0, []
    for _ in range(len(EVENTS)):
        batch = read_spool(path, offset, max_bytes=100)
        offset = batch.next_offset
        found += batch.events
    assert found == EVENTS


def test_write_that_runs_out_of_space_takes_its_beginning_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    write, room = os.write, [10]

    def write_little(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, room[0] = room[0], 0
        return write(descriptor, data[:taken])

    with SpoolWriter(path) as writer:
        monkeypatch.setattr(os, "write", write_little)
        with pytest.raises(OSError, match="No space"):
            writer.write(EVENTS[0])
        assert path.read_bytes() == before
        room[0] = 10_000
        writer.write(Stopped(step=3, checkpoint=""))
    assert isinstance(read_spool(path, len(before)).events[0], Stopped)


def test_event_longer_than_a_line_may_be_is_refused(path: Path) -> None:
    with SpoolWriter(path) as writer, pytest.raises(ValueError, match="at most"):
        writer.write(Failed(reason="INTERNAL", message="x" * MAX_LINE_BYTES))


def test_numbers_that_json_lacks_become_null(path: Path) -> None:
    nan = float("nan")
    with SpoolWriter(path) as writer:
        offset = path.stat().st_size
        writer.write(
            Progress(
                step=1,
                total_steps=2,
                epoch=0.5,
                loss=nan,
                learning_rate=0.1,
                grad_norm=nan,
                tokens_per_second=1,
                eta_s=1,
            )
        )
    (event,) = read_spool(path, offset).events
    assert isinstance(event, Progress)
    assert (event.loss, event.grad_norm) == (None, None)
