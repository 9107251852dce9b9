"""Many prompts at once, as tests of whole engines ask them."""

from __future__ import annotations

import random
from functools import cache

from tests.unit.engine.decoders import PAD, VOCAB
from tests.unit.engine.driving import prompts


@cache
def crowd() -> tuple[tuple[tuple[int, ...], int], ...]:
    """64 prompts and the lengths of their answers: half of them share a stem, some repeat themselves, some hold the
    padding token.
    """
    chance = random.Random(5)
    stem = prompts([70], seed=9)[0]
    made = []
    for number in range(64):
        own = tuple(chance.randrange(3, VOCAB) for _ in range(chance.choice([1, 3, 9, 31, 40])))
        start = stem[: chance.choice([32, 64, 70])] if number % 2 else ()
        middle = own[:4] * 5 if number % 5 == 0 else (PAD,) * (number % 7 == 0)
        made.append(((*start, *middle, *own), 70 if number % 8 == 3 else chance.choice([1, 4, 9, 16])))
    return tuple(made)
