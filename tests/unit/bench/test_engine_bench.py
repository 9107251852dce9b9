"""The engine bench's own arithmetic: what is asked for, and what is made of the answers."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from tests.bench.engine import workloads
from tests.bench.engine.figures import WrongAnswers, agreement, figures, percentile
from tests.bench.engine.plan import plans
from tests.bench.engine.requests import Answer, Request, answer_from, pack, request_from
from tests.bench.engine.sides.loop import run_in_steps
from tests.bench.peers.setup import runtime_requirements

CORPUS = list(range(10, 5000))


def test_the_closed_workload_is_what_it_says_it_is() -> None:
    requests = workloads.closed(CORPUS).requests
    assert len(requests) == 48
    assert all(16 <= len(each.prompt) <= 128 and 8 <= each.max_new_tokens <= 96 for each in requests)
    assert {each.arrival_s for each in requests} == {0.0}
    assert len({len(each.prompt) for each in requests}) > 20


def test_a_seed_gives_the_same_requests_and_an_offset_others() -> None:
    assert workloads.closed(CORPUS, offset=3) == workloads.closed(CORPUS, offset=3)
    prompts = {offset: {each.prompt for each in workloads.closed(CORPUS, offset=offset).requests} for offset in (3, 4)}
    assert not prompts[3] & prompts[4]


def test_arrivals_are_random_at_the_rate_asked_for() -> None:
    requests = workloads.poisson(CORPUS, 4000, 50, requests_per_s=8.0).requests
    times = [each.arrival_s for each in requests]
    waits = np.diff(times)
    assert times[0] == 0
    assert times == sorted(times)
    # Exponential with mean 1/4 s: mean and deviation are the same.
    assert statistics.mean(waits) == pytest.approx(0.25, rel=0.08)
    assert float(np.std(waits)) == pytest.approx(0.25, rel=0.12)


def test_the_shared_prefix_is_shared_within_a_run_only() -> None:
    runs = [workloads.shared_prefix(CORPUS, offset=offset).requests for offset in (0, 1)]
    prefixes = [{each.prompt[:512] for each in run} for run in runs]
    assert [len(each) for each in prefixes] == [1, 1]
    assert prefixes[0] != prefixes[1]
    assert len({each.prompt for each in runs[0]}) == 32


def test_long_prompts_come_while_short_ones_run() -> None:
    workload = workloads.long_beside_short(CORPUS)
    long = [each for each in workload.requests if each.group == "long"]
    assert all(len(each.prompt) >= 1024 and each.arrival_s > 0 for each in long)
    assert workload.max_tokens <= 2048


def test_every_named_workload_has_plans() -> None:
    found = plans(["closed", "poisson", "shared_prefix", "long_beside_short"], CORPUS, 6, 2.0)
    names = ["closed_6", "poisson_50", "poisson_80", "poisson_95", "shared_prefix_512", "long_beside_short"]
    assert [plan.name for plan in found] == names
    assert [plan.make(0).name for plan in found] == names


def test_requests_and_answers_survive_the_wire() -> None:
    request = Request(prompt=(1, 2), max_new_tokens=3, arrival_s=0.5, group="long")
    answer = Answer(token_ids=[4], token_times_s=[0.7], cached_prompt_tokens=1)
    assert request_from(pack(request)) == request
    assert answer_from(pack(answer)) == answer


@pytest.mark.parametrize("rank", [0, 1, 50, 73.5, 99, 100])
def test_percentiles_are_those_of_numpy(rank: float) -> None:
    values = [5.0, 1.0, 4.0, 1.5, 9.0, 2.0, 2.5]
    assert percentile(values, rank) == pytest.approx(float(np.percentile(values, rank)))


def test_figures_by_hand() -> None:
    requests = [
        Request(prompt=(1,), max_new_tokens=3, arrival_s=1.0, group="short"),
        Request(prompt=(1,), max_new_tokens=2, arrival_s=2.0, group="long"),
    ]
    answers = [
        Answer(token_ids=[1, 2, 3], token_times_s=[1.5, 2.0, 3.0], cached_prompt_tokens=4),
        Answer(token_ids=[1, 2], token_times_s=[4.0, 6.0], cached_prompt_tokens=1),
    ]
    found = figures(requests, answers, streams=True)
    assert found.makespan_s == 5.0
    assert found.output_tokens_per_s == 1.0
    assert found.requests_per_s == pytest.approx(0.4)
    assert found.cached_prompt_tokens == 5
    assert found.latencies_ms["ttft_p50_ms"] == 1250  # of 500 and 2000
    assert found.latencies_ms["itl_p50_ms"] == 1000  # of 500, 1000 and 2000
    assert found.latencies_ms["short_itl_p50_ms"] == 750
    assert found.latencies_ms["long_e2e_p50_ms"] == 4000
    assert found.rate("ttft_p50_ms") == pytest.approx(1 / 1.25)


def test_too_few_tokens_are_no_speed() -> None:
    with pytest.raises(WrongAnswers, match="request 0"):
        figures([Request(prompt=(1,), max_new_tokens=2)], [Answer(token_ids=[1], token_times_s=[1.0])], streams=True)


def test_agreement_counts_whole_answers_and_tokens_before_the_first_difference() -> None:
    ours = [Answer(token_ids=[1, 2, 3, 4]), Answer(token_ids=[5, 6])]
    theirs = [Answer(token_ids=[1, 2, 9, 4]), Answer(token_ids=[5, 6])]
    found = agreement(ours, theirs)
    assert (found.same_answers, found.same_tokens) == (0.5, round(4 / 6, 3))


def test_a_stepped_engine_gets_requests_when_they_arrive() -> None:
    requests = [
        Request(prompt=(1,), max_new_tokens=2, arrival_s=0.05),
        Request(prompt=(1,), max_new_tokens=1),
    ]
    submitted: list[int] = []
    open_requests: dict[int, int] = {}

    def submit(index: int, request: Request) -> None:
        submitted.append(index)
        open_requests[index] = request.max_new_tokens

    def step() -> list[tuple[int, list[int]]]:
        news = [(index, [7]) for index, left in open_requests.items() if left]
        for index, _ in news:
            open_requests[index] -= 1
        return news

    answers = run_in_steps(requests, submit, step)
    assert submitted == [1, 0]
    assert [answer.token_ids for answer in answers] == [[7, 7], [7]]
    assert answers[0].token_times_s[0] >= 0.05


def test_requirements_of_a_wheel_leave_out_extras_other_machines_and_what_is_named() -> None:
    metadata = "\n".join(
        (
            "Metadata-Version: 2.4",
            "Requires-Dist: torch==2.13.0+cpu",
            "Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0",
            'Requires-Dist: protobuf==7.36.1; platform_machine == "no-such-machine"',
            'Requires-Dist: bench; extra == "bench"',
        )
    )
    assert runtime_requirements(metadata, without=frozenset({"torch"})) == ["fastapi[standard]<0.137.0,>=0.133.0"]
