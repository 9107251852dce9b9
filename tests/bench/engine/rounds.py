"""Runs the sides in turns and makes comparisons of what they did.

A round is one run of every side, on the same requests; the order turns around from round to round. Slow sides take
part in the first rounds only.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.bench.engine.figures import Agreement, Figures, agreement, figures
from tests.bench.engine.plan import Plan
from tests.bench.engine.requests import Answer
from tests.bench.engine.side import RunningSide
from tests.bench.engine.workloads import SEED
from tests.bench.report import Comparison

MIN_SAME_ANSWERS = 0.9
"""In float32, fewer equal answers than this are more than near-ties."""


@dataclass(slots=True, kw_only=True)
class Round:
    """What each side made of one set of requests, by its name."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)


def run_rounds(plan: Plan, sides: Sequence[RunningSide], num_runs: int, num_slow_runs: int) -> list[Round]:
    """All rounds of a plan; says on stderr how they go."""
    able = [side for side in sides if not (plan.has_arrivals and side.kind.static)]
    rounds = []
    for number in range(num_runs):
        partners = [side for side in able if number < num_slow_runs or not side.kind.is_slow]
        rounds.append(_round(plan, partners if number % 2 == 0 else partners[::-1], number))
    return rounds


def _round(plan: Plan, sides: Sequence[RunningSide], number: int) -> Round:
    requests = plan.make(number).requests
    done = Round()
    for side in sides:
        answers, streams = side.run(requests)
        done.answers[side.name] = answers
        done.figures[side.name] = figures(requests, answers, streams=streams)
        rate = done.figures[side.name].output_tokens_per_s
        print(f"  {plan.name} {number + 1}: {side.name} {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    return done


def comparisons(
    plan: Plan, rounds: Sequence[Round], sides: Sequence[RunningSide], facts: Mapping[str, Any], *, device: str
) -> Iterator[dict[str, Any]]:
    """The lines of a plan: each of our sides against each other one, on each measure that both have."""
    for ours in (side for side in sides if side.kind.is_ours):
        for theirs in (side for side in sides if not side.kind.is_ours):
            shared = [each for each in rounds if ours.name in each.figures and theirs.name in each.figures]
            for measure in plan.measures if shared else ():
                if all(_has(each.figures[theirs.name], measure) for each in shared):
                    yield _line(plan, measure, shared, ours, theirs, facts, device)


def _has(figures_: Figures, measure: str) -> bool:
    return measure == "output_tokens_per_s" or measure in figures_.latencies_ms


def _line(
    plan: Plan,
    measure: str,
    rounds: Sequence[Round],
    ours: RunningSide,
    theirs: RunningSide,
    facts: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    our_figures = [each.figures[ours.name] for each in rounds]
    their_figures = [each.figures[theirs.name] for each in rounds]
    alike = _mean_agreement([agreement(each.answers[ours.name], each.answers[theirs.name]) for each in rounds])
    dtype = str(facts["dtype"])
    return Comparison(
        bench="engine",
        workload=f"{plan.name}_at_{facts['concurrency']}",
        side=f"{facts['batching']}_{ours.name}",
        versus=theirs.name,
        ours=[each.rate(measure) for each in our_figures],
        theirs=[each.rate(measure) for each in their_figures],
        unit="output tokens/s" if measure == "output_tokens_per_s" else "1/s",
        seed=SEED,
        device=device,
        dtype=dtype,
        extra={
            "measure": measure,
            **{key: value for key, value in facts.items() if key != "dtype"},
            "same_answers": alike.same_answers,
            "same_tokens": alike.same_tokens,
            "answers_agree": dtype != "float32" or alike.same_answers >= MIN_SAME_ANSWERS,
            "ours": absolute(our_figures),
            "theirs": absolute(their_figures),
            "versions_theirs": theirs.facts,
            "settings_ours": ours.facts,
        },
    ).line()


def _mean_agreement(found: Sequence[Agreement]) -> Agreement:
    return Agreement(
        same_answers=round(statistics.mean(each.same_answers for each in found), 3),
        same_tokens=round(statistics.mean(each.same_tokens for each in found), 3),
    )


def absolute(runs: Sequence[Figures]) -> dict[str, Any]:
    """Medians over the runs, and every run's rate."""
    values: dict[str, Any] = {
        "output_tokens_per_s": round(statistics.median(each.output_tokens_per_s for each in runs), 2),
        "requests_per_s": round(statistics.median(each.requests_per_s for each in runs), 3),
        "runs_tokens_per_s": [round(each.output_tokens_per_s, 2) for each in runs],
    }
    for name in runs[0].latencies_ms:
        values[name] = round(statistics.median(each.latencies_ms[name] for each in runs), 2)
    if (cached := runs[-1].cached_prompt_tokens) is not None:
        values["cached_prompt_tokens"] = cached
    return values
