"""Constrained answers in the continuous engine match by a second source, beside others that are free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench
from tests.unit.engine.driving import generate_alone, request
from tests.unit.models.tokenizer_folders import byte_level, save_folder
from tokenizers import Tokenizer

from slipstream_server.inference.engine.constraints import Grammars
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import Constraint, Finished, Sampling, Stopping


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
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for each in guided:
        answer = bench.answers[each.id]
        assert answer.terminals == [Finished(each.id)]
        for index, tokens in answer.tokens.items():
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            assert answer.finish_reasons[index] == "eos_token"
            assert re.fullmatch(pattern, text), text
    with speaking.as_loaded():
        expected = generate_alone(speaking.traits.model, (9, 8, 7), max_new_tokens=40)
    assert bench.answers[free.id].tokens[0] == expected
    assert bench.answers[bad.id].failure is not None
