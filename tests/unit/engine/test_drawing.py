"""Sampling: the filters against transformers' own, draws against a hand computation, and their independence of the
batch.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.engine.driving import Bench, prompts, request, tiny_model
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from slipstream_server.inference.engine import drawing
from slipstream_server.inference.engine.core import Row
from slipstream_server.inference.engine.drawing import Sampler, filtered
from slipstream_server.inference.engine.draws import uniforms
from slipstream_server.inference.generation import Sampling


def row_with(sampling: Sampling, index: int = 0) -> Row:
    return Row(request((5,), sampling=sampling), index, np.array([5]))


def warped(scores_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What transformers makes of one row of scores, in its order."""
    steps: list[Any] = []
    if sampling.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1.0:
        steps.append(TypicalLogitsWarper(sampling.typical_p))
    scores = scores_V[None].clone()
    for step in steps:
        scores = step(None, scores)
    return scores[0]


samplings = st.builds(
    Sampling,
    do_sample=st.just(True),
    temperature=st.sampled_from([1.0, 0.3, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.1, 0.6, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.2, 0.9]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(samplings, min_size=1, max_size=6), st.integers(0, 10_000), st.sampled_from([3, 60, 700]))
def test_what_a_gpu_is_not_asked_for_changes_no_draw(mixed: list[Sampling], seed: int, vocab_size: int) -> None:
    """Where the host does not ask how many candidates there are, all of them are sorted: the same tokens come out."""
    generator = torch.Generator().manual_seed(seed)
    scores_SV = torch.randn(len(mixed), vocab_size, generator=generator) * 3
    if all(sampling.top_p == 1.0 for sampling in mixed):
        # Ties with the k-th stay, all of them; which of several likeliest ones stands first for top_p is anybody's say.
        scores_SV = (2 * scores_SV).round() / 2
    scores_SV[:, ::7] = -torch.inf
    rows = [row_with(sampling, index) for index, sampling in enumerate(mixed)]

    def drawn() -> list[int]:
        tokens_S = torch.full((len(rows),), -1)
        Sampler(rows, torch.device("cpu")).choose(scores_SV, tokens_S)
        return tokens_S.tolist()

    asked = drawn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "_may_ask", lambda _: False)
        assert drawn() == asked


@settings(max_examples=150, deadline=None)
@given(st.lists(samplings, min_size=1, max_size=6), st.integers(0, 10_000), st.sampled_from([3, 60, 700]))
def test_filters_equal_transformers_row_by_row(mixed: list[Sampling], seed: int, vocab_size: int) -> None:
    """Rows of different settings are filtered together, each as transformers would alone."""
    generator = torch.Generator().manual_seed(seed)
    scores_SV = torch.randn(len(mixed), vocab_size, generator=generator, dtype=torch.float64) * 3
    found = filtered(scores_SV, [row_with(sampling) for sampling in mixed])
    expected = torch.stack([warped(scores_V, sampling) for scores_V, sampling in zip(scores_SV, mixed, strict=True)])
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected)


def test_ties_with_the_kth_token_stay_as_in_transformers() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    sampling = Sampling(do_sample=True, top_k=2)
    found = filtered(scores, [row_with(sampling)])
    assert torch.equal(found[0].isfinite(), warped(scores[0], sampling).isfinite())
    assert found[0].isfinite().tolist() == [False, True, True, True, True, False]


def test_nucleus_wider_than_the_first_guess() -> None:
    """An even distribution over many tokens: top_p needs more of them than are looked at first."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 5000, generator=generator, dtype=torch.float64) * 0.01
    sampling = Sampling(do_sample=True, top_p=0.9)
    found = filtered(scores, [row_with(sampling), row_with(sampling)])
    assert torch.equal(found.isfinite(), torch.stack([warped(row, sampling) for row in scores]).isfinite())
    assert int(found.isfinite().sum(dim=1).min()) > 4000


@pytest.mark.parametrize(
    "sampling", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "min_p": 0.1, "temperature": 0.5}]
)
def test_a_draw_inverts_the_cumulative_distribution_in_token_order(sampling: dict[str, Any]) -> None:
    """Computed by hand in Python floats, from transformers' filters."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(40, 30, generator=generator, dtype=torch.float64) * 2
    rows = [row_with(Sampling(do_sample=True, seed=seed, **sampling), index=seed % 3) for seed in range(40)]
    tokens = torch.zeros(40, dtype=torch.int64)
    Sampler(rows, torch.device("cpu")).choose(scores, tokens)
    for scores_V, row, token in zip(scores, rows, tokens.tolist(), strict=True):
        mass = warped(scores_V, row.request.sampling).softmax(dim=0).tolist()
        target = float(uniforms([row.request.sampling.seed], [row.index], [0])[0])
        total, expected = 0.0, -1
        while total <= target:
            expected += 1
            total += mass[expected]
        assert token == expected


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).log().expand(20_000, 3)
    rows = [row_with(Sampling(do_sample=True, seed=seed)) for seed in range(20_000)]
    tokens = torch.zeros(20_000, dtype=torch.int64)
    Sampler(rows, torch.device("cpu")).choose(scores, tokens)
    shares = [count / 20_000 for _, count in sorted(Counter(tokens.tolist()).items())]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.015)


@pytest.mark.parametrize(("draw", "expected"), [(0.0, 2), (0.25, 3), (1.0 - 2.0**-53, 3)])
def test_a_draw_on_a_boundary_takes_what_has_mass(draw: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of no mass stand before the first and behind the last."""
    monkeypatch.setattr(drawing, "uniforms", lambda seeds, indices, positions: np.array([draw]))
    scores = torch.tensor([[0.0, 0.0, 0.25, 0.75, 0.0]], dtype=torch.float64).log()
    tokens = torch.zeros(1, dtype=torch.int64)
    Sampler([row_with(Sampling(do_sample=True, seed=1))], torch.device("cpu")).choose(scores, tokens)
    assert tokens.tolist() == [expected]


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 5e-324])
def test_the_smallest_temperatures_draw_the_likeliest_token_that_is_allowed(temperature: float, top_k: int) -> None:
    scores = torch.tensor([[-torch.inf, 11.0, 12.0, -40.0, -torch.inf]])
    tokens = torch.zeros(1, dtype=torch.int64)
    sampling = Sampling(do_sample=True, temperature=temperature, top_k=top_k, seed=1)
    Sampler([row_with(sampling)], torch.device("cpu")).choose(scores, tokens)
    assert tokens.tolist() == [2]


def test_fewer_tokens_than_top_k_are_kept_where_fewer_are_allowed() -> None:
    scores_SV = torch.full((2, 5000), -torch.inf)
    scores_SV[0, [7, 40]] = torch.tensor([1.0, 2.0])
    scores_SV[1, 9] = 0.5
    rows = [row_with(Sampling(do_sample=True, top_k=50)), row_with(Sampling(do_sample=True, top_k=1))]
    group = drawing._group("top_k", [0, 1], rows, torch.device("cpu"))
    values_SN, ids_SN = drawing._most_likely(scores_SV, group)
    assert values_SN.tolist() == [[2.0, 1.0], [0.5, -torch.inf]]
    assert ids_SN[0].tolist() == [40, 7]
    assert ids_SN[1, 0] == 9


def test_temperature_zero_is_greedy() -> None:
    (prompt,) = prompts([9])
    model = tiny_model("llama")
    cold, greedy = Bench(model).run(
        request(prompt, sampling=Sampling(do_sample=True, temperature=0.0, seed=4)), request(prompt)
    )
    assert cold.tokens == greedy.tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_sampled_answers_do_not_depend_on_the_batch(name: str) -> None:
    """Alone, among others, and in another order: the same seeds give the same tokens, and different sequences
    differ.
    """
    model = tiny_model(name)
    asked = [
        (prompt, Sampling(do_sample=True, seed=seed, temperature=9.0, **extra))
        for seed, (prompt, extra) in enumerate(
            zip(
                prompts([3, 30, 12, 7], seed=2),
                [{}, {"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.02, "repetition_penalty": 1.2, "typical_p": 0.9}],
                strict=True,
            )
        )
    ]

    def requests() -> list[Any]:
        return [request(prompt, sampling=sampling, num_return_sequences=2) for prompt, sampling in asked]

    alone = [Bench(model).run(each)[0].tokens for each in requests()]
    together = [answer.tokens for answer in Bench(model).run(*requests(), *[request(p) for p in prompts([50, 2])])[:4]]
    reversed_order = [answer.tokens for answer in Bench(model).run(*reversed(requests()))][::-1]
    assert alone == together == reversed_order
    assert all(tokens[0] != tokens[1] for tokens in alone)


def test_another_seed_gives_another_answer() -> None:
    model = tiny_model("llama")
    (prompt,) = prompts([6])
    answers = Bench(model).run(*[request(prompt, sampling=Sampling(do_sample=True, seed=s)) for s in (1, 1, 2)])
    assert answers[0].tokens == answers[1].tokens != answers[2].tokens
