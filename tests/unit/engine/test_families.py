"""Families of decoder-only models: continuous batches answer as ``generate`` does, or the model is served padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.unit.engine.continuous_driving import ContinuousBench, packed, reference
from tests.unit.engine.decoders import VOCAB, build
from tests.unit.engine.driving import generate_alone, prompts, request
from tests.unit.models.tokenizer_folders import byte_level, save_folder
from transformers import AutoModelForCausalLM, GraniteConfig

from slipstream_server.inference.engine import gathered_attention
from slipstream_server.inference.engine.assembly import assemble
from slipstream_server.inference.engine.fused_decoder import _FusedLayer
from slipstream_server.inference.engine.gpu_memory import GpuMemory
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.paged_attention import (
    AttentionRule,
    CpuMemory,
    LayerShape,
    Layout,
    UnsupportedAttention,
)
from slipstream_server.inference.engine.passes import Traits
from slipstream_server.inference.generation import Beams, Constraint, Failed
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.load_options import LoadOptions

CONTINUOUS = [
    "llama-biased", "llama-odd-heads", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma", "gemma3", "phi", "phi3",
    "gpt2", "opt", "gpt_neox", "stablelm",
]  # fmt: skip
# Experts multiply in float32 at most, and Gemma 2's own softmax is in float32. In float32, layers are fused.
IN_FLOAT32 = [
    "gemma2",
    "mixtral",
    "qwen2_moe",
    "llama",
    "llama-biased",
    "mistral",
    "qwen2-sliding",
    "qwen3",
    "gemma3",
    "phi",
]
PADDED = {
    "falcon-rope": "AttentionInterface", "falcon-alibi": "AttentionInterface", "bloom": "position_ids",
    "mpt": "position_ids", "mamba": "position_ids", "qwen2_moe-sliding": "only its masks",
    "llama4": "chunked_attention",
}  # fmt: skip
LENGTHS = [1, 33, 70]
NUM_NEW = 10
NEAR_TIE = 1e-4


def equals_but_for_a_near_tie(model: Any, prompt: tuple[int, ...], found: list[int], expected: list[int]) -> bool:
    """Whether the answers are equal, or the reference's best two logits at their first difference are a tie."""
    if found == expected:
        return True
    place = next(i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs)
    with torch.inference_mode():
        logits_V = model(torch.tensor([[*prompt, *expected[:place]]])).logits[0, -1]
    best, second = logits_V.float().topk(2).values.tolist()
    return best - second <= NEAR_TIE


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in CONTINUOUS] + [(name, torch.float32) for name in IN_FLOAT32],
    ids=str,
)
def test_a_family_answers_as_generate_does(name: str, dtype: torch.dtype) -> None:
    """Prompts beyond windows and over blocks' ends, in chunks, with a prefix that is read again."""
    asked = prompts(LENGTHS)
    asked.append((*asked[2][:64], 7, 8))
    bench = ContinuousBench(packed(name, dtype), max_step_tokens=48, max_draft_tokens=3)
    answers = bench.run(*[request(prompt, NUM_NEW) for prompt in asked])
    model = reference(name, dtype)
    expected = [generate_alone(model, prompt, max_new_tokens=NUM_NEW) for prompt in asked]
    found = [answer.tokens[0] for answer in answers]
    if dtype == torch.float64:
        assert found == expected
    else:
        assert all(map(equals_but_for_a_near_tie, [model] * len(asked), asked, found, expected))
        assert sum(map(list.__eq__, found, expected)) >= len(asked) - 1
    assert len({tuple(answer) for answer in expected}) > 2, "the model says the same to everything"


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 2), ("mistral", 2), ("qwen2-sliding", 2), ("qwen3", 0), ("phi", 0)]
)
def test_layers_of_the_commonest_build_run_as_one(name: str, count: int) -> None:
    modules = packed(name, torch.float32).traits.model.modules()
    assert sum(isinstance(vars(module).get("forward"), _FusedLayer) for module in modules) == count


def test_a_layer_that_does_more_than_it_looks_runs_part_by_part() -> None:
    """Granite has the parts of Llama, and scales what it adds to its residuals."""
    torch.manual_seed(4)
    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, residual_multiplier=0.3, initializer_range=0.2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    (prompt,) = prompts([40])
    expected = generate_alone(model, prompt, max_new_tokens=10)
    (answer,) = ContinuousBench(PackedModel(Traits.of(model))).run(request(prompt, 10))
    assert answer.tokens[0] == expected


def test_a_beam_search_after_fused_steps_runs_the_model_as_it_was_loaded() -> None:
    model, (prompt,) = reference("llama", torch.float32), prompts([40])
    asked = [request(prompt, 6), request(prompt, 10, beams=Beams(num_beams=3)), request(prompt, 12)]
    answers = ContinuousBench(packed("llama", torch.float32)).run(*asked)
    expected = [
        generate_alone(model, prompt, max_new_tokens=length, num_beams=beams)
        for length, beams in ((6, 1), (10, 3), (12, 1))
    ]
    assert [answer.tokens[0] for answer in answers] == expected


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2", "qwen2-sliding", "phi3", "gpt2", "opt", "mixtral"])
def test_a_search_whose_prompt_is_read_in_pieces_equals_generate(name: str) -> None:
    model, asked = reference(name, torch.float32), prompts([1, 2, 70])
    searches = [request(prompt, 8, beams=Beams(num_beams=3)) for prompt in asked]
    answers = ContinuousBench(packed(name, torch.float32), max_step_tokens=32).run(*searches)
    expected = [generate_alone(model, prompt, max_new_tokens=8, num_beams=3) for prompt in asked]
    assert [answer.tokens[0] for answer in answers] == expected


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2", "qwen2-sliding", "phi3"])
def test_windows_matter_to_these_models(name: str) -> None:
    """Without its window the model says something else: the test above would see one that is not kept."""
    (prompt,) = prompts([70])
    unbounded = build(name, torch.float32)
    unbounded.config.sliding_window = 4096
    for module in unbounded.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 4096
    answers = [generate_alone(model, prompt, max_new_tokens=8) for model in (unbounded, build(name, torch.float32))]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("name", PADDED)
def test_what_cannot_run_from_blocks_is_refused_by_name(name: str) -> None:
    model = build(name, torch.float32)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedAttention, match=PADDED[name]):
        PackedModel(Traits.of(model))
    assert model.config._attn_implementation == before


def test_what_fails_when_it_runs_from_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise ValueError("no kernel for such a head")

    monkeypatch.setattr(CpuMemory, "lay_out", fails)
    with pytest.raises(UnsupportedAttention, match=r"from blocks \(ValueError\)"):
        PackedModel(Traits.of(build("llama")))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_that_come_with_a_checkpoint_hide_nothing(name: str) -> None:
    bare = build(name)
    adapted = get_peft_model(bare, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    traits = Traits.of(adapted)
    assert (traits.takes_position_ids, traits.takes_logits_to_keep) == (True, True)
    (prompt,) = prompts([40])
    expected = generate_alone(adapted, prompt, max_new_tokens=8)
    (answer,) = ContinuousBench(PackedModel(traits)).run(request(prompt, 8))
    assert answer.tokens[0] == expected


@pytest.mark.parametrize(("name", "batching"), [("falcon-alibi", "padded"), ("opt", "continuous")])
def test_assembly_falls_back_to_padded_batches_and_says_so(name: str, batching: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model", byte_level())
    model = build(name, torch.float32)
    model.save_pretrained(folder)
    config = WorkerConfig(
        model_folder=folder, engine="continuous", load=LoadOptions(dtype="float32"), max_batch_tokens=1024, threads=1
    )
    engine, ready = assemble(config, lambda fraction, stage: None, lambda: None)
    assert ready.batching == batching
    assert ("AttentionInterface" in ready.settings.get("batching_reason", "")) == (batching == "padded")
    asked = request((5, 6, 7), 4)
    engine.submit(asked)
    tokens: list[int] = []
    while engine.wait_s() is not None:
        for event in engine.step():
            tokens += getattr(event, "token_ids", [])
    assert tokens == generate_alone(model, (5, 6, 7), max_new_tokens=4)
    # The vocabulary has been read: doing so later would hold up everybody's steps.
    (folder / "tokenizer.json").unlink()
    engine.submit(request((5, 6, 7), constraint=Constraint(kind="regex", text="[0-9]{3}")))
    constrained = []
    while engine.wait_s() is not None:
        constrained += engine.step()
    assert [event for event in constrained if isinstance(event, Failed)] == []
    assert sum(len(getattr(event, "token_ids", [])) for event in constrained) == 3


def random_step(generator: np.random.Generator, shape: LayerShape, num_queries: int) -> tuple[Layout, Any]:
    """Three sequences with a past of 40, 0 and 65 tokens, which read 1, 37 and 5 more."""
    tables = np.array([[5, 1, 0], [2, 7, 0], [3, 0, 6]], dtype=np.int32)
    starts, counts = [40, 0, 65], [1, 37, 5]
    positions = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    layout = Layout(
        rows_N=np.repeat(np.arange(3, dtype=np.int32), counts),
        positions_N=positions.astype(np.int32),
        tables_SB=tables,
        starts=(0, 1, 38, 43),
    )
    sizes = ((num_queries, shape.key_size), (shape.num_heads, shape.key_size), (shape.num_heads, shape.value_size))
    return layout, [torch.from_numpy(generator.normal(size=(1, heads, 43, size))) for heads, size in sizes]


@pytest.mark.parametrize("window", [0, 8, 40])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
@pytest.mark.parametrize("num_queries", [2, 6])
def test_the_memory_of_other_devices_answers_as_that_of_the_cpu(window: int, softcap: float, num_queries: int) -> None:
    shape = LayerShape(num_heads=2, key_size=16, value_size=16)
    cpu = CpuMemory([shape], 8, torch.float64)
    other = GpuMemory([shape], 8, torch.float64, [torch.device("cpu")], gathered_attention)
    generator = np.random.default_rng(3)
    past = Layout(
        rows_N=np.repeat(np.arange(2, dtype=np.int32), [40, 65]),
        positions_N=np.concatenate([np.arange(40), np.arange(65)]).astype(np.int32),
        tables_SB=np.array([[5, 1, 0], [3, 0, 6]], dtype=np.int32),
        starts=(0, 40, 105),
    )
    states = [torch.from_numpy(generator.normal(size=(1, heads, 105, 16))) for heads in (num_queries, 2, 2)]
    step, new_states = random_step(generator, shape, num_queries)
    rule = AttentionRule(scale=0.3, window=window, softcap=softcap)
    for layout, (queries, keys, values) in ((past, states), (step, new_states)):
        outputs = []
        for memory in (cpu, other):
            memory.lay_out(layout)
            outputs.append(memory.attend(0, queries, keys, values, rule))
        torch.testing.assert_close(
            outputs[0], outputs[1], rtol=1e-6 if softcap else 1e-10, atol=1e-6 if softcap else 1e-10
        )


def test_a_model_runs_from_the_memory_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedModel, "_is_on_cpu", False)
    model = PackedModel(Traits.of(build("gemma3")))
    asked = prompts([1, 45, 70])
    answers = ContinuousBench(model, max_step_tokens=40).run(*[request(prompt, 10) for prompt in asked])
    assert isinstance(model._memory, GpuMemory)
    assert [a.tokens[0] for a in answers] == [
        generate_alone(reference("gemma3"), prompt, max_new_tokens=10) for prompt in asked
    ]


def test_prompts_name_tokens_of_these_models() -> None:
    assert max(max(prompt) for prompt in prompts(LENGTHS)) < VOCAB
