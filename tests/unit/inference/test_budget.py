"""Who may hold memory and who gives way, over random lives of models, against the definition of least recently used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.errors import OutOfMemory
from slipstream_server.inference.budget import Candidate, MemoryBudget

BOUND = 100
NAMES = st.sampled_from("abcdef")
STEPS = st.one_of(
    st.tuples(st.just("load"), NAMES, st.integers(1, 120)),
    st.tuples(st.just("touch"), NAMES, st.just(0)),
    st.tuples(st.just("pin"), NAMES, st.just(0)),
    st.tuples(st.just("unload"), NAMES, st.just(0)),
)


@given(steps=st.lists(STEPS, max_size=40))
def test_a_load_fits_or_the_oldest_give_way_or_it_is_refused(steps: list[tuple[str, str, int]]) -> None:
    budget = MemoryBudget({"cpu": BOUND})
    held: dict[str, int] = {}
    used: dict[str, int] = {}
    pinned: set[str] = set()
    for now, (what, name, size) in enumerate(steps):
        if what == "touch" and name in held:
            used[name] = now
        elif what == "pin":
            pinned ^= {name}
        elif what == "unload":
            budget.release(name)
            held.pop(name, None)
        elif what == "load" and name not in held:
            idle = sorted((other for other in held if other not in pinned), key=lambda other: used[other])
            candidates = [Candidate(name=other, last_used_s=used[other]) for other in idle]
            could_free = sum(held[other] for other in idle)
            if size > BOUND - sum(held.values()) + could_free:
                with pytest.raises(OutOfMemory):
                    budget.victims(name, {"cpu": size}, candidates)
                continue
            victims = budget.victims(name, {"cpu": size}, candidates)
            check_victims(victims, idle, held, size)
            for victim in victims:
                budget.release(victim)
                del held[victim]
            budget.take(name, {"cpu": size})
            held[name], used[name] = size, now
        assert budget.held_bytes("cpu") == sum(held.values()) <= BOUND


def check_victims(victims: tuple[str, ...], idle: list[str], held: dict[str, int], size: int) -> None:
    """Enough, nobody needlessly, and nobody beyond the shortest run of least recently used ones that is enough."""
    left = BOUND - sum(held.values())
    assert left + sum(held[victim] for victim in victims) >= size
    for spared in victims:
        assert left + sum(held[victim] for victim in victims if victim != spared) < size
    run = next(n for n in range(len(idle) + 1) if left + sum(held[name] for name in idle[:n]) >= size)
    assert set(victims) <= set(idle[:run])


def test_only_tenants_of_the_device_that_is_short_give_way() -> None:
    budget = MemoryBudget({"cpu": 10, "cuda:0": 10})
    budget.take("on-cpu", {"cpu": 10})
    budget.take("on-gpu", {"cuda:0": 10})
    idle = [Candidate(name="on-cpu", last_used_s=1), Candidate(name="on-gpu", last_used_s=2)]
    assert budget.victims("new", {"cuda:0": 5}, idle) == ("on-gpu",)


def test_what_must_come_may_overdraw_and_nobody_else_comes_then() -> None:
    budget = MemoryBudget({"cpu": 10})
    budget.force("told", {"cpu": 15})
    with pytest.raises(OutOfMemory) as refused:
        budget.take("asks", {"cpu": 1})
    assert refused.value.metadata["left_bytes"] == "0"
    assert (refused.value.metadata["needed_bytes"], refused.value.metadata["budget_bytes"]) == ("1", "10")
    assert budget.total() == {"cpu": 15}


def test_a_device_without_a_bound_takes_all() -> None:
    budget = MemoryBudget({"cpu": 1})
    budget.take("far", {"cuda:3": 2**50})
    assert budget.left_bytes("cuda:3") is None
    assert budget.left_bytes("cpu") == 1
