"""The workloads, from a seed: who asks for what, and when. Pure; the same arguments give the same requests everywhere.

Every run of a workload takes another ``offset``, so that no side finds the prompts of an earlier run in its prefix
cache; all sides of one round get the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.bench.engine.requests import Request

SEED = 20262
PROMPT_TOKENS = (16, 128)
NEW_TOKENS = (8, 96)
SHARED_PREFIX_TOKENS = 512
LONG_PROMPT_TOKENS = (1024, 1536)
SENTENCES = (
    "The {0} near the {1} was painted in the year when the {2} came to town.",
    "Nobody could say why the {0} had been left beside the {1} for so long.",
    "If you want to understand a {0}, begin with the {1} and not with the {2}.",
    "She wrote a letter about the {0}, because her brother had asked for the {1}.",
    "There are three reasons to prefer a {0} over a {1}; the first of them is the {2}.",
    "In the morning they carried the {0} to the market and sold it for a {1}.",
)
NOUNS = (
    "river stone lamp paper engine garden number window mirror market train violin winter harbour ladder clock bridge"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[Request, ...]

    @property
    def num_output_tokens(self) -> int:
        return sum(request.max_new_tokens for request in self.requests)

    @property
    def max_tokens(self) -> int:
        """Prompt and answer of the longest."""
        return max(len(request.prompt) + request.max_new_tokens for request in self.requests)


def corpus_text(num_sentences: int = 600) -> str:
    """Plain sentences to cut prompts from."""
    chance, nouns = random.Random(SEED), NOUNS.split()
    return " ".join(chance.choice(SENTENCES).format(*chance.sample(nouns, 3)) for _ in range(num_sentences))


def closed(corpus: Sequence[int], num_requests: int = 48, offset: int = 0) -> Workload:
    """Mixed lengths, all at once."""
    chance = _chance("closed", offset)
    requests = tuple(
        Request(prompt=_cut(corpus, chance, *PROMPT_TOKENS), max_new_tokens=chance.randint(*NEW_TOKENS))
        for _ in range(num_requests)
    )
    return Workload(name=f"closed_{num_requests}", requests=requests)


def poisson(corpus: Sequence[int], num_requests: int, percent: int, requests_per_s: float, offset: int = 0) -> Workload:
    """The closed workload's mixture, arriving at random: on average ``percent`` of ``requests_per_s``."""
    chance = _chance(f"poisson_{percent}", offset)
    arrival_s = 0.0
    requests = []
    for request in closed(corpus, num_requests, offset=1_000 * percent + offset).requests:
        requests.append(replace(request, arrival_s=arrival_s))
        arrival_s += chance.expovariate(requests_per_s * percent / 100)
    return Workload(name=f"poisson_{percent}", requests=tuple(requests))


def shared_prefix(corpus: Sequence[int], num_requests: int = 32, offset: int = 0) -> Workload:
    """One long beginning (another in every run), a short question each, all at once."""
    chance = _chance("shared_prefix", offset)
    prefix = _cut(corpus, chance, SHARED_PREFIX_TOKENS, SHARED_PREFIX_TOKENS)
    requests = tuple(
        Request(prompt=prefix + _cut(corpus, chance, 16, 48), max_new_tokens=chance.randint(16, 48))
        for _ in range(num_requests)
    )
    return Workload(name=f"shared_prefix_{SHARED_PREFIX_TOKENS}", requests=requests)


def long_beside_short(corpus: Sequence[int], num_short: int = 12, num_long: int = 4, offset: int = 0) -> Workload:
    """Short prompts that generate for long, while a long prompt comes in every second and a half."""
    chance = _chance("long_beside_short", offset)
    short = [
        Request(prompt=_cut(corpus, chance, 16, 64), max_new_tokens=chance.randint(64, 96), group="short")
        for _ in range(num_short)
    ]
    long = [
        Request(
            prompt=_cut(corpus, chance, *LONG_PROMPT_TOKENS),
            max_new_tokens=chance.randint(16, 32),
            arrival_s=1.5 * (number + 1),
            group="long",
        )
        for number in range(num_long)
    ]
    return Workload(name="long_beside_short", requests=(*short, *long))


def warm_up(corpus: Sequence[int], num_requests: int) -> Workload:
    """As many rows as a side runs at once, a few tokens each, and one long prompt."""
    chance = _chance("warm_up", 0)
    short = [Request(prompt=_cut(corpus, chance, 16, 64), max_new_tokens=6) for _ in range(num_requests)]
    return Workload(name="warm_up", requests=(*short, Request(prompt=_cut(corpus, chance, 300, 300), max_new_tokens=4)))


def _chance(name: str, offset: int) -> random.Random:
    return random.Random(f"{SEED}/{name}/{offset}")


def _cut(corpus: Sequence[int], chance: random.Random, least: int, most: int) -> tuple[int, ...]:
    length = chance.randint(least, most)
    start = chance.randrange(len(corpus) - length)
    return tuple(corpus[start : start + length])
