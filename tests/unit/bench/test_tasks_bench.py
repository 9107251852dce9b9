"""The tasks bench: what it accepts as agreement, its texts, and callers that share the work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tests.bench.tasks.__main__ import WrongValues, check
from tests.bench.tasks.side import CLASSIFY, EMBED
from tests.bench.tasks.slipstream_side import Ask, by_callers
from tests.bench.tasks.texts import MAX_WORDS, MIN_WORDS, texts_of


def test_vectors_of_one_direction_agree() -> None:
    assert check(EMBED, "other", [[3.0, 4.0]], [[0.6, 0.8]]) == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[[4.0, 3.0]], [[0.6, float("nan")]], [[0.6, 0.8, 0.0]], []])
def test_vectors_of_another_direction_or_shape_do_not(values: list[list[float]]) -> None:
    with pytest.raises(WrongValues):
        check(EMBED, "other", values, [[0.6, 0.8]])


def test_scores_agree_within_rounding() -> None:
    assert check(CLASSIFY, "other", [[0.3, 0.7]], [[0.3005, 0.6995]]) == pytest.approx(5e-4)
    with pytest.raises(WrongValues, match="classify"):
        check(CLASSIFY, "other", [[0.3, 0.7]], [[0.302, 0.698]])


def test_texts_are_the_same_for_a_seed_and_of_mixed_lengths() -> None:
    lengths = [len(text.split()) for text in texts_of(400)]
    assert texts_of(400) == texts_of(400) != texts_of(400, offset=1)
    assert min(lengths) >= MIN_WORDS
    assert max(lengths) <= MAX_WORDS
    assert sum(length < 30 for length in lengths) > 150
    assert sum(length > 100 for length in lengths) > 30


async def test_callers_share_the_texts_and_none_asks_twice_at_once() -> None:
    running: dict[int, int] = {}
    most_together = 0

    def ask(number: int) -> Ask:
        async def one(text: str) -> Sequence[float]:
            nonlocal most_together
            running[number] = running.get(number, 0) + 1
            assert running[number] == 1
            most_together = max(most_together, sum(running.values()))
            await asyncio.sleep(0)
            running[number] -= 1
            return [float(text)]

        return one

    done = await by_callers([str(number) for number in range(20)], 4, ask)
    assert done.values == [[float(number)] for number in range(20)]
    assert most_together == 4
    assert done.seconds > 0
