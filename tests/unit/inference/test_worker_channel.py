"""The worker's end of the socket when something goes wrong: the engine hears of it, so that the process ends."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator

import pytest

from slipstream_server.inference import generation, worker_channel
from slipstream_server.inference.generation import Event, Finished, Loading, TaskResults, decode_events
from slipstream_server.inference.worker_channel import Channel, Gone
from slipstream_server.tasks.items import ItemError


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the front's end of its socket. The process it lives in is this one: it must not exit."""
    monkeypatch.setattr(worker_channel.os, "_exit", lambda code: None)
    front, worker = socket.socketpair()
    with front, worker:
        front.settimeout(10)
        channel = Channel(worker)
        yield channel, front
        front.close()
        # It arms the process's end when it sees that; not after the patch is gone.
        channel._reader.join(10)
        assert not channel._reader.is_alive()


@pytest.mark.parametrize("unsendable", [object(), Loading(2.0, "\ud800"), Loading(1.0, "x" * (65 << 20))])
def test_events_that_cannot_be_sent_end_the_worker_instead_of_silencing_it(
    ends: tuple[Channel, socket.socket], unsendable: object, caplog: pytest.LogCaptureFixture
) -> None:
    channel, front = ends
    channel.send([Finished(1)])
    channel.send([unsendable])  # type: ignore[list-item]
    assert isinstance(channel.next_command(10.0), Gone)
    assert channel.send([Finished(2)]) is False
    assert "events cannot be sent" in caplog.text
    received = b"".join(iter(lambda: front.recv(1 << 16), b""))
    assert received.count(b"finished") == 1  # what came before is sent, and then the end of the stream


def test_a_step_too_long_for_a_frame_goes_in_several(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_FRAME_BYTES", 300)
    results = [ItemError("INTERNAL", f"{n}" * 100) for n in range(5)]
    step: list[Event] = [Finished(1), TaskResults(2, [7, 8, 9, 10, 11], [*results], 40), Finished(2), Finished(3)]
    channel, front = ends
    channel.send(step)
    channel.close()
    received = io.BytesIO(b"".join(iter(lambda: front.recv(1 << 16), b"")))
    events: list[Event] = []
    while header := received.read(4):
        length = int.from_bytes(header, "big")
        assert length <= 300
        events += decode_events(received.read(length))
    parts = [event for event in events if isinstance(event, TaskResults)]
    assert [event for event in events if event not in parts] == [Finished(1), Finished(2), Finished(3)]
    assert events.index(Finished(2)) > events.index(parts[-1]) > events.index(parts[0]) > events.index(Finished(1))
    assert [index for part in parts for index in part.indices] == [7, 8, 9, 10, 11]
    assert [result for part in parts for result in part.results] == results
    assert sum(part.num_tokens for part in parts) == 40


def test_a_front_that_hangs_up_is_told_to_the_engine(ends: tuple[Channel, socket.socket]) -> None:
    channel, front = ends
    front.close()
    assert isinstance(channel.next_command(10.0), Gone)
