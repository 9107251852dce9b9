"""The continuous engine on a real GPU: compiled kernels, CUDA graphs, KV memory by the device's share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.unit.engine.continuous_driving import ContinuousBench
from tests.unit.engine.decoders import build
from tests.unit.engine.driving import generate_alone, prompts, request
from tests.unit.engine.test_gpu_memory import layout_of

from slipstream_server.inference.engine import gathered_attention
from slipstream_server.inference.engine.decode_graphs import CudaRecorder
from slipstream_server.inference.engine.gpu_memory import GpuMemory
from slipstream_server.inference.engine.kv_budget import blocks_within, device_memory
from slipstream_server.inference.engine.packed_pass import PackedModel
from slipstream_server.inference.engine.paged_attention import AttentionRule, LayerShape, Layout
from slipstream_server.inference.engine.passes import Traits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def models(request: pytest.FixtureRequest) -> tuple[str, PackedModel]:
    return request.param, PackedModel(Traits.of(build(request.param, torch.float32).to(GPU)))


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_answers_are_those_of_generate_alone(
    models: tuple[str, PackedModel], is_recorded: bool, runs_ahead: bool
) -> None:
    name, model = models
    bench = ContinuousBench(model, max_running=8, runs_ahead=runs_ahead)
    if is_recorded:
        assert model.record_decoding(CudaRecorder(GPU), 8)
    asked = prompts([4, 40, 9, 33, 17])
    answers = bench.run(*[request(prompt, max_new_tokens=4 + 3 * i) for i, prompt in enumerate(asked)])
    alone = build(name, torch.float32)
    for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        assert answer.tokens[0] == generate_alone(alone, prompt, max_new_tokens=4 + 3 * i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [((32, 8), 128), ((9, 3), 64), ((4, 4), 80), ((8, 1), 256)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (100, 0.0), (0, 30.0)])
def test_compiled_kernels_agree_with_plain_torch(
    dtype: torch.dtype, heads: tuple[int, int], size: int, window: int, softcap: float
) -> None:
    pytest.importorskip("triton")
    from slipstream_server.inference.engine import gpu_attention

    shape = LayerShape(num_heads=heads[1], key_size=size, value_size=size)
    ours = GpuMemory([shape], 200, dtype, [GPU], gpu_attention)
    # Their sums in float32 whatever the dtype: the reference must be the more exact one.
    theirs = GpuMemory([shape], 200, torch.float32, [GPU], gathered_attention)
    generator = torch.Generator(GPU).manual_seed(5)
    blocks = torch.randperm(200, generator=torch.Generator().manual_seed(5)).int().numpy().reshape(4, 50)

    def step(layout: Layout) -> None:
        queries, keys, values = (
            torch.randn(1, layout.starts[-1], number, size, generator=generator, device=GPU).to(dtype).transpose(1, 2)
            for number in (heads[0], heads[1], heads[1])
        )
        found, expected = (
            _attended(memory, layout, [states.to(kind) for states in (queries, keys, values)], window, softcap)
            for memory, kind in ((ours, dtype), (theirs, torch.float32))
        )
        tolerance = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)

    step(layout_of((1500, 33, 700, 5), (0, 0, 0, 0), blocks))
    step(layout_of((1, 1, 1, 40), (1500, 33, 700, 5), blocks))
    step(layout_of((1, 1, 1, 1), (1501, 34, 701, 45), blocks))


def test_blocks_fill_the_share_of_the_device() -> None:
    memory = device_memory({GPU: 1})
    free, total = memory[GPU]
    fraction = 1 - free / total / 2
    num_blocks = blocks_within(fraction, {GPU: 2**20}, memory, most_blocks=10**9, least_blocks=1)
    assert num_blocks == pytest.approx(free / 2 / 2**20, rel=0.01)


def _attended(
    memory: GpuMemory, layout: Layout, states: Sequence[torch.Tensor], window: int, softcap: float
) -> torch.Tensor:
    memory.lay_out(layout)
    rule = AttentionRule(scale=states[0].shape[-1] ** -0.5, window=window, softcap=softcap)
    return memory.attend(0, *states, rule)
