"""Which rows are held out for evaluation: decided by seed and content alone.

The same file and seed give the same split on every machine, and rows of equal content land on the same side, so that no
evaluated row has been trained on. Order within both sides is the file's. Pure functions; any thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from slipstream_server.training.rows import Row, row_digest


def split_rows(rows: Sequence[Row], *, held_out_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """``(trained, held_out)``: the share of ``rows`` nearest to the fraction, at least one row each side where contents
    allow.
    """
    digests = [row_digest(row) for row in rows]
    wanted = min(max(1, round(held_out_fraction * len(rows))), len(rows) - 1) if held_out_fraction > 0 else 0
    held_out = _first_contents(digests, wanted, seed)
    return (
        [row for row, digest in zip(rows, digests, strict=True) if digest not in held_out],
        [row for row, digest in zip(rows, digests, strict=True) if digest in held_out],
    )


def _first_contents(digests: Sequence[bytes], wanted: int, seed: int) -> frozenset[bytes]:
    """Contents in the order of a keyed hash, as many as hold ``wanted`` rows without taking the last content of all."""
    num_rows: dict[bytes, int] = {}
    for digest in digests:
        num_rows[digest] = num_rows.get(digest, 0) + 1
    key = seed.to_bytes(8, "big", signed=True)
    order = sorted(num_rows, key=lambda digest: hashlib.blake2b(digest, key=key).digest())
    taken: set[bytes] = set()
    total = 0
    for digest in order[:-1]:
        if total >= wanted:
            break
        taken.add(digest)
        total += num_rows[digest]
    return frozenset(taken)
