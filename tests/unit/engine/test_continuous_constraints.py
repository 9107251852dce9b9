"""Constrained answers in the continuous engine match by a second source, beside others that are free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench
from tests.unit.engine.driving import generate_alone, request
from tests.unit.models.tokenizer_folders import KINDS, byte_level, save_folder
from tokenizers import Tokenizer

from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import Constraint, Finished, GenerationRequest, Sampling, Stopping

DRAWN = Sampling(do_sample=True, seed=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tokenizer"), byte_level())


@pytest.fixture(scope="module")
def speaking() -> PackedModel:
    """A model whose vocabulary is that of the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return PackedModel(Traits.of(LlamaForCausalLM(config).to(torch.float64).eval()))


def without(folder: Path, letter: str) -> dict[int, float]:
    """A bias that bans every token with this letter."""
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return {token_id: -float("inf") for token, token_id in vocabulary.items() if letter in token}


def text_of(folder: Path, tokens: list[int]) -> str:
    return str(Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=True))


def test_constrained_answers_match_beside_others_that_are_not(
    speaking: PackedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled beside the engine, drawn or greedy; guides survive forwards that fail in company."""
    bench = ContinuousBench(speaking, 7, grammars=Grammars(folder, 400), max_step_tokens=40, max_draft_tokens=4)
    pattern = r"[a-c]{40,50}/(cat|dog)s?"
    stopping = Stopping(max_new_tokens=80, eos_token_ids=(1,))
    guided = [
        request(
            (5, 6, 7 + seed) * 10, stopping=stopping, sampling=Sampling(do_sample=seed > 0, seed=seed),
            constraint=Constraint(kind="regex", text=pattern), num_return_sequences=2,
        )
        for seed in range(4)
    ]  # fmt: skip
    free = request((9, 8, 7), 40)
    bad = request((9, 8), 4, constraint=Constraint(kind="regex", text=r"(a)\1"))
    original, sizes = PackedModel.run, []

    def run(self: PackedModel, chunks: Any, slots: Any) -> torch.Tensor:
        sizes.append(len(chunks))
        if len(sizes) % 7 == 0 and len(chunks) > 1:
            raise RuntimeError("injected")
        return original(self, chunks, slots)

    bench.submit(*guided, free, bad)
    with monkeypatch.context() as patched:
        patched.setattr(PackedModel, "run", run)
        while bench.engine.wait_s() is not None:
            bench.step()
    assert any(size > 1 for size in sizes[6::7]), "no forward has failed"
    for each in guided:
        answer = bench.answers[each.id]
        assert answer.terminals == [Finished(each.id)]
        for index, tokens in answer.tokens.items():
            text = text_of(folder, tokens)
            assert answer.finish_reasons[index] == "eos_token"
            assert re.fullmatch(pattern, text), text
    with speaking.as_loaded():
        expected = generate_alone(speaking.traits.model, (9, 8, 7), max_new_tokens=40)
    assert bench.answers[free.id].tokens[0] == expected
    assert bench.answers[bad.id].failure is not None


@pytest.mark.parametrize("options", [{"runs_ahead": True}, {"max_draft_tokens": 4}], ids=str)
def test_what_cannot_be_met_fails_alone_at_once_or_in_mid_answer(
    speaking: PackedModel, folder: Path, options: dict[str, Any]
) -> None:
    """No text at all matches; or the request's own bans leave no token that its grammar still allows."""
    stopping = Stopping(max_new_tokens=60, eos_token_ids=(1,))

    def guided(pattern: str, **others: Any) -> GenerationRequest:
        return request((5, 6, 7), stopping=stopping, constraint=Constraint(kind="regex", text=pattern), **others)

    unmet = guided(r"[^\s\S]")
    biased = guided("a{30}b", sampling=Sampling(logit_bias=without(folder, "b")))
    drawn = guided(
        "c{20}b", num_return_sequences=2, sampling=Sampling(do_sample=True, seed=4, logit_bias=without(folder, "b"))
    )
    repeating = guided("(ab){40}", sampling=Sampling(no_repeat_ngram_size=2))
    neighbours = [request((9, 8, 7), 50), guided("[a-c]{40}(cat|dog)"), request((7, 7), 50, sampling=DRAWN)]
    bench = ContinuousBench(speaking, grammars=Grammars(folder, 400), **options)
    bench.submit(unmet, biased, drawn, repeating, *neighbours)
    while bench.engine.wait_s() is not None:
        bench.step()
    assert bench.num_held == 0
    said = {}
    for each in (unmet, biased, drawn, repeating):
        answer = bench.answers[each.id]
        assert answer.failure is not None
        assert answer.failure.reason == "INVALID_FIELD"
        assert answer.failure.message.startswith("constraint")
        assert ("leaves no token" in answer.failure.message) == (each is not unmet)
        said[each.id] = [text_of(folder, tokens) for tokens in answer.tokens.values()]
    assert said[unmet.id] == []
    assert said[biased.id] == ["a" * 30]
    assert "c" * 20 in said[drawn.id]
    assert re.fullmatch("(ab)+a?", said[repeating.id][0])
    with speaking.as_loaded():
        expected = generate_alone(speaking.traits.model, (9, 8, 7), max_new_tokens=50)
    assert bench.answers[neighbours[0].id].tokens[0] == expected
    assert re.fullmatch("[a-c]{40}(cat|dog)", text_of(folder, bench.answers[neighbours[1].id].tokens[0]))
    (by_itself,) = ContinuousBench(speaking).run(request((7, 7), 50, sampling=DRAWN))
    assert bench.answers[neighbours[2].id].tokens == by_itself.tokens


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_letter_that_no_token_spells_ends_the_request_where_it_is_due(
    speaking: PackedModel, tmp_path: Path, runs_ahead: bool
) -> None:
    """The compiler takes the pattern: which tokens there are shows only on the way."""
    folder = save_folder(tmp_path / "pieces", KINDS["metaspace"]())
    bench = ContinuousBench(speaking, grammars=Grammars(folder, 400), runs_ahead=runs_ahead)
    stopping = Stopping(max_new_tokens=60, eos_token_ids=(1,))
    asked = [
        request((5, 6), stopping=stopping, constraint=Constraint(kind="regex", text=pattern))
        for pattern in ("hello (☃|☂)", "hello (☃|there)")
    ]
    free = request((9, 8, 7), 20)
    bench.submit(*asked, free)
    while bench.engine.wait_s() is not None:
        bench.step()
    stuck, saved = [bench.answers[each.id] for each in asked]
    assert stuck.failure is not None
    assert (stuck.failure.reason, "no text that matches" in stuck.failure.message) == ("INVALID_FIELD", True)
    assert text_of(folder, stuck.tokens[0]).strip() == "hello"
    assert saved.failure is None
    assert text_of(folder, saved.tokens[0]) == "hello there"
    with speaking.as_loaded():
        expected = generate_alone(speaking.traits.model, (9, 8, 7), max_new_tokens=20)
    assert bench.answers[free.id].tokens[0] == expected
