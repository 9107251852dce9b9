"""Rounds and the lines made of them, with sides that answer from a table instead of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from tests.bench.engine.plan import Plan, plans
from tests.bench.engine.requests import Answer, Request
from tests.bench.engine.rounds import comparisons, run_rounds
from tests.bench.engine.side import KINDS, RunningSide
from tests.bench.engine.table import print_table

CORPUS = list(range(10, 5000))
FACTS = {"dtype": "float32", "concurrency": 16, "batching": "continuous", "model": "tiny", "threads": 2}


class TableSide:
    """Answers with token 7 all the time, one token every ``interval_s``; notes when it was its turn."""

    def __init__(self, name: str, interval_s: float, turns: list[str], token: int = 7) -> None:
        self.name, self.kind, self.facts = name, KINDS[name], {"version": name}
        self._interval_s, self._turns, self._token = interval_s, turns, token

    def run(self, requests: Sequence[Request]) -> tuple[list[Answer], bool]:
        self._turns.append(self.name)
        return [self._answer(request) for request in requests], not self.kind.static

    def _answer(self, request: Request) -> Answer:
        times = [request.arrival_s + self._interval_s * (place + 1) for place in range(request.max_new_tokens)]
        return Answer(token_ids=[self._token] * len(times), token_times_s=times)


def sides_of(turns: list[str], **intervals_s: float) -> list[RunningSide]:
    return cast(list[RunningSide], [TableSide(name, interval, turns) for name, interval in intervals_s.items()])


def plan_of(name: str) -> Plan:
    return plans([name], CORPUS, 6, 2.0)[0]


def lines_of(plan: Plan, sides: list[RunningSide], num_runs: int = 5) -> list[dict[str, Any]]:
    return list(comparisons(plan, run_rounds(plan, sides, num_runs, 2), sides, FACTS, device="cpu"))


def test_the_order_turns_around_and_slow_sides_leave_early() -> None:
    turns: list[str] = []
    run_rounds(plan_of("closed"), sides_of(turns, grpc=0.1, vllm=0.1, generate=0.1), 3, 1)
    assert turns == ["grpc", "vllm", "generate", "vllm", "grpc", "grpc", "vllm"]


def test_a_side_twice_as_fast_has_the_ratio_two() -> None:
    lines = lines_of(plan_of("closed"), sides_of([], grpc=0.1, vllm=0.2, generate=0.5))
    assert [(line["versus"], line["ratio_median"], line["runs"]) for line in lines] == [
        ("vllm", 2.0, 5),
        ("generate", 5.0, 2),
    ]
    assert lines[0]["workload"] == "closed_6_at_16"
    assert lines[0]["side"] == "continuous_grpc"
    assert lines[0]["ours"]["itl_p50_ms"] == 100
    assert lines[0]["same_answers"] == 1.0
    print_table(lines)


def test_latencies_compare_so_that_larger_is_better_and_static_sides_have_none() -> None:
    lines = lines_of(plan_of("poisson"), sides_of([], engine=0.1, vllm=0.3, generate=0.1), num_runs=1)
    assert {line["versus"] for line in lines} == {"vllm"}
    assert {line["measure"] for line in lines} == {"ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"}
    assert all(line["ratio_median"] == pytest.approx(3.0, rel=1e-3) for line in lines)


def test_other_answers_in_float32_are_marked() -> None:
    turns: list[str] = []
    other = cast(RunningSide, TableSide("vllm", 0.1, turns, token=8))
    line = lines_of(plan_of("closed"), [*sides_of(turns, grpc=0.1), other], num_runs=1)[0]
    assert line["same_answers"] == 0.0
    assert line["answers_agree"] is False
