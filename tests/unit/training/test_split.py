"""The held-out split: fixed by seed and content."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slipstream_server.training.rows import CompletionRow
from slipstream_server.training.split import split_rows


def rows(*prompts: str) -> list[CompletionRow]:
    return [CompletionRow(line=place, prompt=prompt, completion="x") for place, prompt in enumerate(prompts, start=1)]


def held_out_prompts(prompts: list[str], seed: int) -> set[str]:
    _, held_out = split_rows(rows(*prompts), held_out_fraction=0.2, seed=seed)
    return {row.prompt for row in held_out if isinstance(row, CompletionRow)}


def test_split_depends_on_seed_and_content_only() -> None:
    prompts = [str(number) for number in range(50)]
    assert held_out_prompts(prompts, 1) == held_out_prompts(prompts[::-1], 1)
    assert len(held_out_prompts(prompts, 1)) == 10
    assert held_out_prompts(prompts, 1) != held_out_prompts(prompts, 2)


def test_equal_rows_stay_together() -> None:
    for seed in range(20):
        train, held_out = split_rows(rows(*"aabbccdd"), held_out_fraction=0.25, seed=seed)
        assert not {row.prompt for row in train} & {row.prompt for row in held_out}  # type: ignore[union-attr]
        assert (len(train), len(held_out)) == (6, 2)


def test_fraction_of_zero_holds_nothing_out() -> None:
    assert split_rows(rows("a", "b"), held_out_fraction=0.0, seed=0)[1] == []


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.floats(0.0, 0.5), st.integers(0, 2**32 - 1))
def test_no_row_is_lost_and_training_keeps_one(prompts: list[str], fraction: float, seed: int) -> None:
    given_rows = rows(*prompts)
    train, held_out = split_rows(given_rows, held_out_fraction=fraction, seed=seed)
    assert sorted([*train, *held_out], key=lambda row: row.line) == given_rows
    assert train
    assert [row.line for row in train] == sorted(row.line for row in train)
