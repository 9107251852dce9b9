"""The scheduler's promises, as properties over random crowds of requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.inference.engine.scheduler import BatchLimits, Scheduler, num_rows
from slipstream_server.inference.generation import AdapterPin, Beams, GenerationRequest, Sampling, Stopping


def share_key(request: GenerationRequest) -> int:
    return request.beams.num_beams


@st.composite
def crowds(draw: st.DrawFn) -> list[GenerationRequest]:
    size = draw(st.integers(1, 30))
    return [
        GenerationRequest(
            id=number,
            prompt_token_ids=(1,) * draw(st.integers(1, 50)),
            sampling=Sampling(),
            stopping=Stopping(max_new_tokens=draw(st.integers(1, 50))),
            num_return_sequences=draw(st.integers(1, 3)),
            beams=Beams(num_beams=draw(st.sampled_from([1, 1, 1, 4]))),
            priority=draw(st.integers(0, 2)),
            deadline_monotonic_s=draw(st.sampled_from([None, None, 5.0])),
        )
        for number in range(size)
    ]


limits_strategy = st.builds(
    BatchLimits,
    max_batch_size=st.integers(1, 8),
    max_batch_tokens=st.integers(1, 400),
    max_queue_delay_ms=st.just(10.0),
)


def drain(scheduler: Scheduler) -> list[list[GenerationRequest]]:
    batches = []
    while len(scheduler):
        batches.append(scheduler.collect(1000.0))
        assert batches[-1], "requests that have waited long enough are not collected"
    return batches


@given(crowds(), limits_strategy)
def test_every_request_is_collected_once_and_batches_keep_the_limits(
    crowd: list[GenerationRequest], limits: BatchLimits
) -> None:
    scheduler = Scheduler(limits, share_key)
    for request in crowd:
        scheduler.add(request, 0.0)
    waiting = {request.id: request for request in crowd}
    for batch in drain(scheduler):
        first = min(waiting.values(), key=lambda request: (request.priority, request.id))
        assert batch[0] is first, "the first in order must never be overtaken"
        assert batch == sorted(batch, key=lambda request: (request.priority, request.id))
        assert len({share_key(request) for request in batch}) == 1
        rows = sum(num_rows(request) for request in batch)
        longest = max(len(request.prompt_token_ids) for request in batch)
        newest = max(request.stopping.max_new_tokens for request in batch)
        if len(batch) > 1:
            assert rows <= limits.max_batch_size
            assert rows * (longest + newest) <= limits.max_batch_tokens
        for request in batch:
            del waiting[request.id]
    assert not waiting


@given(crowds(), limits_strategy)
def test_nobody_is_left_out_who_would_have_fitted(crowd: list[GenerationRequest], limits: BatchLimits) -> None:
    scheduler = Scheduler(limits, share_key)
    for request in crowd:
        scheduler.add(request, 0.0)
    batch = scheduler.collect(1000.0)
    left = [request for request in crowd if request not in batch and share_key(request) == share_key(batch[0])]
    for request in left:
        together = [*batch, request]
        rows = sum(num_rows(each) for each in together)
        tokens = rows * (
            max(len(each.prompt_token_ids) for each in together)
            + max(each.stopping.max_new_tokens for each in together)
        )
        assert rows > limits.max_batch_size or tokens > limits.max_batch_tokens


def one(number: int, **fields: object) -> GenerationRequest:
    return GenerationRequest(
        id=number, prompt_token_ids=(1,), sampling=Sampling(), stopping=Stopping(max_new_tokens=1), **fields
    )  # type: ignore[arg-type]


def test_a_batch_that_is_not_full_waits_for_company_but_not_longer_than_told() -> None:
    scheduler = Scheduler(BatchLimits(max_batch_size=3, max_queue_delay_ms=10), share_key)
    assert scheduler.due_s() is None
    scheduler.add(one(1), 5.0)
    scheduler.add(one(2), 5.005)
    assert scheduler.collect(5.009) == []
    assert scheduler.due_s() == 5.01
    assert [request.id for request in scheduler.collect(5.01)] == [1, 2]


def test_a_full_batch_does_not_wait() -> None:
    scheduler = Scheduler(BatchLimits(max_batch_size=2, max_queue_delay_ms=1000), share_key)
    scheduler.add(one(1), 0.0)
    assert scheduler.collect(0.0) == []
    scheduler.add(one(2), 0.0)
    assert [request.id for request in scheduler.collect(0.0)] == [1, 2]


def test_removed_and_expired_requests_are_not_collected() -> None:
    scheduler = Scheduler(BatchLimits(max_queue_delay_ms=0), share_key)
    for request in (one(1), one(2, deadline_monotonic_s=5.0), one(3, deadline_monotonic_s=9.0)):
        scheduler.add(request, 0.0)
    assert scheduler.next_deadline_s() == 5.0
    assert scheduler.remove(1)
    assert not scheduler.remove(1)
    assert [request.id for request in scheduler.take_expired(5.0)] == [2]
    assert [request.id for request in scheduler.collect(6.0)] == [3]
    assert len(scheduler) == 0


def test_a_batch_names_no_more_adapters_than_it_may() -> None:
    """The rest is passed over, not waited for; requests for adapters of the batch and for the base still join it."""
    scheduler = Scheduler(BatchLimits(max_batch_adapters=2, max_queue_delay_ms=1000), lambda _: None)
    adapters = {name: AdapterPin(version=name, digest=name, folder="") for name in "abc"}
    wanted = ["a", "b", "c", None, "a"]
    for request_id, name in enumerate(wanted):
        scheduler.add(
            GenerationRequest(
                id=request_id,
                prompt_token_ids=(1,),
                sampling=Sampling(),
                stopping=Stopping(max_new_tokens=1),
                adapter=adapters[name] if name else None,
            ),
            now_s=0.0,
        )
    assert [each.id for each in scheduler.collect(0.0)] == [0, 1, 3, 4]
    assert scheduler.collect(0.0) == []
    assert [each.id for each in scheduler.collect(2.0)] == [2]
