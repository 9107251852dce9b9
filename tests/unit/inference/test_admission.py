"""The queue is bounded, prefers the urgent, and starves nobody."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.errors import QueueFull
from slipstream_server.inference.admission import AdmissionLimits, AdmissionQueue
from slipstream_server.inference.calls import Priority


@dataclass(eq=False)
class Item:
    id: int
    priority: Priority = Priority.NORMAL
    num_prompt_tokens: int = 1
    arrival_s: float = 0.0
    is_search: bool = False


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def drained(queue: AdmissionQueue[Item]) -> list[int]:
    ids = []
    while (item := queue.peek()) is not None:
        queue.take(item)
        ids.append(item.id)
    return ids


def test_priority_first_then_age() -> None:
    queue = AdmissionQueue[Item](AdmissionLimits(), Clock())
    for item_id, priority in enumerate([Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL, Priority.HIGH]):
        queue.put(Item(item_id, priority, arrival_s=item_id / 100))
    assert drained(queue) == [2, 4, 1, 3, 0]


def test_low_is_served_after_twice_the_ageing_time_whatever_comes() -> None:
    clock = Clock()
    queue = AdmissionQueue[Item](AdmissionLimits(ageing_s=10.0), clock)
    queue.put(Item(0, Priority.LOW))
    served_at_s = None
    for second in range(60):
        clock.now_s = float(second)
        queue.put(Item(second + 1, Priority.HIGH, arrival_s=clock.now_s))
        item = queue.peek()
        assert item is not None
        queue.take(item)
        if item.id == 0:
            served_at_s = second
            break
    assert served_at_s == 20


def test_requests_are_bounded_and_told_when_to_come_back() -> None:
    queue = AdmissionQueue[Item](AdmissionLimits(max_requests=3), Clock())
    for item_id in range(3):
        queue.put(Item(item_id))
    with pytest.raises(QueueFull) as caught:
        queue.put(Item(4))
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0


def test_the_estimate_follows_the_pace() -> None:
    clock = Clock()
    queue = AdmissionQueue[Item](AdmissionLimits(max_requests=50), clock)
    for item_id in range(50):
        queue.put(Item(item_id))
    for item_id in range(50, 150):
        clock.now_s += 0.4
        item = queue.peek()
        assert item is not None
        queue.take(item)
        queue.put(Item(item_id))
    with pytest.raises(QueueFull) as caught:
        queue.put(Item(999))
    assert caught.value.retry_after_s == pytest.approx(0.4 * 50 / 2, rel=0.2)


def test_prompt_tokens_are_bounded_but_one_request_always_fits() -> None:
    queue = AdmissionQueue[Item](AdmissionLimits(max_prompt_tokens=100), Clock())
    queue.put(Item(1, num_prompt_tokens=500))
    with pytest.raises(QueueFull, match="500 tokens"):
        queue.put(Item(2))


def test_reserved_places_count() -> None:
    queue = AdmissionQueue[Item](AdmissionLimits(max_requests=1), Clock())
    queue.reserve()
    with pytest.raises(QueueFull):
        queue.reserve()
    queue.release()
    queue.put(Item(1))
    with pytest.raises(QueueFull):
        queue.reserve()


def test_put_back_goes_first_in_the_order_of_the_last_call() -> None:
    queue = AdmissionQueue[Item](AdmissionLimits(max_requests=1), Clock())
    queue.put(Item(1, Priority.HIGH))
    for item_id in (3, 2):
        queue.put_back(Item(item_id, Priority.LOW))
    assert drained(queue) == [2, 3, 1]


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "back", "take", "remove"]), st.integers(0, 9), st.sampled_from(Priority))
    )
)
def test_the_books_always_agree(steps: list[tuple[str, int, Priority]]) -> None:
    queue = AdmissionQueue[Item](AdmissionLimits(), Clock())
    inside: dict[int, Item] = {}
    for action, item_id, priority in steps:
        if action in ("put", "back") and item_id not in inside:
            item = inside[item_id] = Item(item_id, priority, num_prompt_tokens=item_id)
            (queue.put if action == "put" else queue.put_back)(item)
        elif action == "take" and (head := queue.peek()) is not None:
            queue.take(head)
            del inside[head.id]
        elif action == "remove" and item_id in inside:
            assert queue.remove(inside[item_id])
            assert not queue.remove(inside.pop(item_id))
        assert len(queue) == len(inside)
        assert {item.id for item in queue} == inside.keys()
        assert queue.num_prompt_tokens == sum(item.num_prompt_tokens for item in inside.values())
