"""The texts that every side works on: seeded, of mixed lengths. Pure."""

from __future__ import annotations

import math
import random

SEED = 20_263
MIN_WORDS, MAX_WORDS = 4, 160
_WORDS = """
river stone light paper engine quiet morning garden number window silver market travel music winter bridge story simple
answer question doctor school village summer letter kitchen machine picture weather history
"""


def texts_of(num_texts: int, offset: int = 0) -> list[str]:
    """As many texts; their lengths are spread evenly over the orders of magnitude: many short ones, some long ones."""
    source = random.Random(SEED + offset)
    return [" ".join(source.choices(_WORDS.split(), k=_length(source))) for _ in range(num_texts)]


def _length(source: random.Random) -> int:
    return round(math.exp(source.uniform(math.log(MIN_WORDS), math.log(MAX_WORDS))))
