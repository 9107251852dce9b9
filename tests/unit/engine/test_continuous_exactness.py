"""The continuous engine is exact, with each of its ways to save time or room on and off.

The prompts are the same every time; how long answers may become, who comes when, who leaves and who is late is drawn
anew for every combination. Greedy answers equal plain ``generate``; sampled ones equal those of the padded engine,
asked for one request alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench, alone, packed, padded_bench
from tests.unit.engine.decoders import VOCAB
from tests.unit.engine.driving import prompts, request

from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.generation import Finished, GenerationRequest, Sampling, Stopping

# What every switch means, off and on.
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunks": ({"max_step_tokens": 4096}, {"max_step_tokens": 40}),
    "preemption": ({"num_blocks": 200}, {"num_blocks": 11}),
    "prefixes": ({"prefix_caching": False}, {"prefix_caching": True}),
    "drafts": ({"max_draft_tokens": 0}, {"max_draft_tokens": 4}),
}
COMBINATIONS = list(chain.from_iterable(combinations(SWITCHES, size) for size in range(len(SWITCHES) + 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What somebody of the crowd asks for, every time for another number of tokens up to ``longest``."""

    prompt: tuple[int, ...]
    longest: int
    sampling: Sampling
    num_sequences: int
    ends: tuple[int, ...]


@cache
def wishes() -> list[Wish]:
    """64 of them. Every fifth wants a long answer to a short prompt, so that it outgrows the room there was when it
    joined; of the others, some prompts share a stem, some repeat themselves. A third is sampled, some greedy ones have
    a penalty, some may end early.
    """
    chance = random.Random(1)
    (stem,) = prompts([40], seed=9)
    made = []
    for number in range(64):
        is_long = number % 5 == 0
        own = tuple(chance.randrange(3, VOCAB) for _ in range(chance.choice([1, 3, 9] if is_long else [1, 3, 9, 20])))
        start = stem[: chance.choice([32, 40])] if not is_long and chance.random() < 0.4 else ()
        made.append(
            Wish(
                prompt=(*start, *own * (4 if number % 5 == 1 else 1)),
                longest=70 if is_long else chance.randint(2, 10),
                sampling=sampling_of(number, chance),
                num_sequences=chance.choice([1, 2]) if number % 3 == 1 else 1,
                ends=tuple(chance.sample(range(3, VOCAB), 9)) if number % 4 == 1 else (),
            )
        )
    return made


def sampling_of(number: int, chance: random.Random) -> Sampling:
    if number % 3 != 1:
        return Sampling(repetition_penalty=1.3 if number % 9 == 2 else 1.0)
    return Sampling(
        do_sample=True,
        seed=number,
        temperature=chance.choice([1.0, 3.0, 7.0]),
        top_k=chance.choice([0, 0, 8, 40]),
        top_p=chance.choice([1.0, 1.0, 0.8]),
        repetition_penalty=chance.choice([1.0, 1.3]),
        presence_penalty=chance.choice([0.0, 0.6]),
        frequency_penalty=chance.choice([0.0, 0.4]),
    )


@cache
def longest_answers(number: int) -> dict[int, list[int]]:
    """The answer of each sequence of a wish, from a second source: shorter ones are its beginning."""
    wish = wishes()[number]
    if not wish.sampling.do_sample:
        penalty = wish.sampling.repetition_penalty
        return {0: list(alone("llama", wish.prompt, wish.longest, repetition_penalty=penalty))}
    by_itself = request(wish.prompt, wish.longest, sampling=wish.sampling, num_return_sequences=wish.num_sequences)
    return padded_bench().run(by_itself)[0].tokens


def ended(tokens: list[int], stopping: Stopping) -> tuple[list[int], str]:
    """What of a longer answer is said, and why it ends there."""
    for place, token in enumerate(tokens[: stopping.max_new_tokens]):
        if token in stopping.eos_token_ids:
            return tokens[: place + 1], "eos_token"
    return tokens[: stopping.max_new_tokens], "length"


def asked_of(bench: ContinuousBench, chance: random.Random) -> list[GenerationRequest]:
    """A request for each wish, in their order."""
    return [
        request(
            wish.prompt,
            stopping=Stopping(
                max_new_tokens=chance.randint(max(1, wish.longest - 8), wish.longest),
                eos_token_ids=wish.ends,
            ),
            sampling=wish.sampling,
            num_return_sequences=wish.num_sequences,
            priority=chance.randrange(3),
            deadline_monotonic_s=bench.now + chance.uniform(0.5, 8) if chance.random() < 0.08 else None,
        )
        for wish in wishes()
    ]  # fmt: skip


def is_live(bench: ContinuousBench, each: GenerationRequest) -> bool:
    """Whether it has come and has not ended."""
    return each.id in bench.answers and not bench.answers[each.id].terminals


def let_come_and_go(bench: ContinuousBench, asked: list[GenerationRequest], chance: random.Random) -> set[int]:
    """Run until everybody has come and gone, the long answers first; the ids of those who were cancelled meanwhile."""
    left, cancelled = (
        sorted(chance.sample(asked, len(asked)), key=lambda each: each.stopping.max_new_tokens > 10),
        set(),
    )
    while left or bench.engine.wait_s() == 0.0:
        bench.submit(*[left.pop() for _ in range(min(len(left), chance.choice([1, 2, 4, 8])))])
        bench.step()
        bench.now += 0.1
        live = [each.id for each in asked if is_live(bench, each) and each.id not in cancelled]
        if live and chance.random() < 0.04:
            cancelled.add(victim := chance.choice(live))
            bench.engine.cancel(victim)
    bench.run()
    return cancelled


@pytest.mark.parametrize("on", COMBINATIONS, ids=lambda on: " and ".join(on) or "none")
def test_whoever_stays_is_answered_exactly(on: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """And who is cancelled or late has the beginning of its answer. What is on happens, and what is off does not."""
    original = PackedModel.run
    parts: list[Any] = []

    def run(self: PackedModel, chunks: Any, slots: Any) -> torch.Tensor:
        parts.extend(chunk for chunk in chunks if not chunk.gives_token)
        return original(self, chunks, slots)

    monkeypatch.setattr(PackedModel, "run", run)
    chance = random.Random(" ".join(on))
    options: dict[str, Any] = {}
    for name, settings in SWITCHES.items():
        options |= settings[name in on]
    bench = ContinuousBench(packed("llama"), max_running=24, **options)
    asked = asked_of(bench, chance)
    cancelled = let_come_and_go(bench, asked, chance)
    whole = [each for each in asked if bench.answers[each.id].terminals == [Finished(each.id)]]
    assert len(whole) > 0.5 * len(asked)
    assert cancelled == {each.id for each in asked if not bench.answers[each.id].terminals}
    for number, each in enumerate(asked):
        answer = bench.answers[each.id]
        if answer.failure:
            assert (answer.failure.reason, each.deadline_monotonic_s is None) == ("DEADLINE_EXCEEDED", False)
        for index, tokens in longest_answers(number).items():
            expected, reason = ended(tokens, each.stopping)
            found = answer.tokens.get(index, [])
            assert found == (expected if each in whole else expected[: len(found)])
            assert each not in whole or answer.finish_reasons[index] == reason
    scheduler, totals = bench.engine._scheduler, bench.engine._outbox.totals
    counted = {
        "chunks": len(parts),
        "preemption": scheduler.num_preemptions,
        "prefixes": scheduler.num_prefix_hits,
        "drafts": totals.accepted_draft_tokens,
    }
    assert {name for name, count in counted.items() if count} == set(on)
    assert totals.draft_tokens > totals.accepted_draft_tokens or "drafts" not in on


def test_the_crowd_is_worth_asking() -> None:
    """Sampled answers are others than greedy ones, sequences of one request differ, and some answers end early."""
    answers = {number: longest_answers(number) for number in range(len(wishes()))}
    sampled = [number for number, wish in enumerate(wishes()) if wish.sampling.do_sample]
    surprising = [n for n in sampled if answers[n][0] != list(alone("llama", wishes()[n].prompt, wishes()[n].longest))]
    assert len(surprising) > 0.8 * len(sampled)
    assert sum(len({tuple(tokens) for tokens in answers[n].values()}) > 1 for n in sampled) > 5
    assert sum(bool(set(wish.ends) & set(answers[n][0])) for n, wish in enumerate(wishes())) > 5
