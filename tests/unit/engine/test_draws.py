"""The random numbers: published vectors of Philox, and independence of everything but their coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.inference.engine.draws import philox4x32, uniforms


# Known answers of philox4x32-10 as published with Random123 (kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    def words(values: tuple[int, ...]) -> list[np.ndarray]:
        return [np.array([value], dtype=np.uint64) for value in values]

    found = philox4x32(tuple(words(counter)), tuple(words(key)))  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in found) == expected


coordinates = st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**40))


@given(st.lists(coordinates, min_size=1, max_size=20))
def test_a_draw_depends_on_its_own_coordinates_alone(rows: list[tuple[int, int, int]]) -> None:
    together = uniforms(*zip(*rows, strict=True))
    alone = [uniforms([seed], [index], [position])[0] for seed, index, position in rows]
    assert together.tolist() == alone
    assert all(0.0 <= draw < 1.0 for draw in alone)


def test_draws_are_spread_evenly() -> None:
    """A chi-squared test over 64 bins; 130 is exceeded by chance in less than one of 10^5 seeds."""
    number = 64_000
    draws = uniforms([42] * number, [0] * number, range(number))
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    assert float(((counts - number / 64) ** 2 / (number / 64)).sum()) < 130


def test_each_coordinate_matters() -> None:
    base = uniforms([1], [0], [0])[0]
    others = [
        uniforms([2], [0], [0])[0],
        uniforms([1], [1], [0])[0],
        uniforms([1], [0], [1])[0],
        uniforms([1 + 2**40], [0], [0])[0],
    ]
    assert len({base, *others}) == 5
