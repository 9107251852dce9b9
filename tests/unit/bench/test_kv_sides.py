"""The layouts that the bench of KV layouts compares: they all attend alike, and hold what they are said to hold."""

import pytest
import torch
from tests.bench.kv_sides import SIDES, Case, Shape, Side, Step, WrongAttention, checked

from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS

LENGTHS = (5, BLOCK_TOKENS, 2 * BLOCK_TOKENS + 1)


def _case(dtype: torch.dtype = torch.float32) -> Case:
    return Case(
        shape=Shape(num_query_heads=6, num_heads=2, size=16),
        lengths=LENGTHS,
        dtype=dtype,
        device=torch.device("cpu"),
        num_layers=2,
        seed=1,
    )


def _filled(name: str, case: Case) -> Side:
    side = SIDES[name](case)
    for layer in range(case.num_layers):
        side.fill(layer, case.past(layer))
    return side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SIDES)
def test_every_layout_attends_as_float64_does(name: str, dtype: torch.dtype) -> None:
    case = _case(dtype)
    with torch.inference_mode():
        assert checked(name, _filled(name, case), case, Step.of(case)) > 0


def test_a_layout_that_is_filled_wrongly_is_found_out() -> None:
    case = _case()
    side = _filled("dense", case)
    keys, values = case.past(1)
    keys[2, 1, 40] += 1.0
    side.fill(1, (keys, values))
    with pytest.raises(WrongAttention, match="dense differs from float64"):
        checked("dense", side, case, Step.of(case))


def test_padding_and_blocks_hold_different_numbers_of_tokens() -> None:
    case = _case()
    token_bytes = 2 * 2 * 16 * 4  # keys and values, heads, items, bytes of each
    held = {name: SIDES[name](case).held_bytes // token_bytes for name in SIDES}
    padded, in_blocks = 3 * max(LENGTHS), BLOCK_TOKENS * (1 + 1 + 3)
    assert held == {
        "blocks": in_blocks, "gathered": in_blocks,
        "dense": padded, "dense_grouped": padded, "concatenated": padded,
    }  # fmt: skip
