"""The device ledger: what is reserved is not given twice, and what the dead had is free again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from slipstream_server.errors import InvalidField, OutOfMemory
from slipstream_server.storage.device_ledger import FILE, DeviceLedger
from slipstream_server.storage.process_identity import ProcessIdentity

CAPACITY = {"cpu": 100, "cuda:0": 50}


@pytest.fixture
def ledger(tmp_path: Path) -> DeviceLedger:
    return DeviceLedger(tmp_path)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_what_is_left_can_be_reserved_and_no_more(ledger: DeviceLedger) -> None:
    ledger.reserve("a", {"cpu": 60}, CAPACITY)
    ledger.reserve("b", {"cpu": 40, "cuda:0": 50}, CAPACITY)
    with pytest.raises(OutOfMemory) as caught:
        ledger.reserve("c", {"cuda:0": 1}, CAPACITY)
    assert caught.value.metadata == {"device": "cuda:0", "needed_bytes": "1", "left_bytes": "0"}
    ledger.release("b")
    ledger.reserve("c", {"cuda:0": 50}, CAPACITY)


def test_a_refused_reservation_leaves_what_there_was(ledger: DeviceLedger) -> None:
    ledger.reserve("a", {"cpu": 60}, CAPACITY)
    with pytest.raises(OutOfMemory):
        ledger.reserve("a", {"cpu": 101}, CAPACITY)
    assert ledger.reserved_bytes("cpu") == 60
    with pytest.raises(OutOfMemory):
        ledger.reserve("b", {"cpu": 10, "cuda:1": 1}, CAPACITY)
    assert ledger.reserved_bytes("cpu") == 60


def test_a_new_reservation_takes_the_place_of_the_old_one(ledger: DeviceLedger) -> None:
    ledger.reserve("a", {"cpu": 60}, CAPACITY)
    ledger.reserve("a", {"cpu": 90}, CAPACITY)
    assert ledger.reserved_bytes("cpu") == 90


def test_negative_bytes_are_refused(ledger: DeviceLedger) -> None:
    with pytest.raises(InvalidField):
        ledger.reserve("a", {"cpu": -1}, CAPACITY)


def test_the_deads_reservations_are_free(ledger: DeviceLedger, other: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(other.pid)
    assert identity is not None
    ledger.reserve("a", {"cpu": 60}, CAPACITY, identity)
    assert ledger.reserved_bytes("cpu") == 60
    other.kill()
    other.wait()
    assert ledger.reserved_bytes("cpu") == 0


def test_a_reservation_can_be_bound_to_another_process(ledger: DeviceLedger, other: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(other.pid)
    assert identity is not None
    ledger.reserve("a", {"cpu": 60}, CAPACITY)
    ledger.hand_over("a", identity)
    ledger.hand_over("none", identity)
    other.kill()
    other.wait()
    assert ledger.reserved_bytes("cpu") == 0


def test_a_number_that_was_given_again_is_another_process() -> None:
    own = ProcessIdentity.current()
    assert own.is_alive()
    assert not ProcessIdentity(own.pid, "another start").is_alive()


def test_a_process_that_waits_to_be_reaped_is_dead(other: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(other.pid)
    assert identity is not None
    other.kill()
    while other.returncode is None and identity.is_alive():
        pass
    assert ProcessIdentity.of(other.pid) is None
    assert not identity.is_alive()


def test_an_unreadable_file_begins_anew(ledger: DeviceLedger, tmp_path: Path) -> None:
    ledger.reserve("a", {"cpu": 60}, CAPACITY)
    (tmp_path / FILE).write_text("{")
    assert ledger.reserved_bytes("cpu") == 0
    ledger.reserve("b", {"cpu": 100}, CAPACITY)


def _try_to_reserve(folder: Path, name: str) -> bool:
    holder = ProcessIdentity.of(1)  # lives on when this process has gone
    try:
        DeviceLedger(folder).reserve(name, {"cpu": 30}, CAPACITY, holder)
    except OutOfMemory:
        return False
    return True


def test_many_processes_at_once_never_reserve_more_than_there_is(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        got = list(pool.map(_try_to_reserve, [tmp_path] * 12, [f"job-{number}" for number in range(12)]))
    assert sum(got) == 3
    assert DeviceLedger(tmp_path).reserved_bytes("cpu") == 90
