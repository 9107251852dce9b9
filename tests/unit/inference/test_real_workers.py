"""The front over the worker program itself: with the engine that does nothing, and with a tiny model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from tests.unit.inference.collecting import collect

from slipstream_server.inference.calls import GenerateCall, SamplingChoice, StoppingChoice, TextPrompt
from slipstream_server.inference.footprint import process_bytes
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import ModelFacts, read_facts
from unit.inference.conftest import QUICK, is_alive, llama_facts
from unit.models.tokenizer_folders import byte_level, save_folder

Eventually = Callable[..., Awaitable[None]]


@asynccontextmanager
async def serving(
    folder: Path, facts: ModelFacts, worker: WorkerConfig, eventually: Eventually
) -> AsyncIterator[InferenceFront]:
    front = InferenceFront(FrontConfig(restart=QUICK))
    await front.start()
    try:
        front.add_model(ModelPlan(name="tiny", folder=folder, facts=facts, worker=worker))
        await eventually(lambda: front.status("tiny").state in ("ready", "failed"), timeout_s=90)
        assert front.status("tiny").state == "ready", front.status("tiny").error
        yield front
    finally:
        await front.close()


def call(text: str, max_new_tokens: int = 8, **sampling: object) -> GenerateCall:
    return GenerateCall(
        prompt=TextPrompt(text=text),
        stopping=StoppingChoice(max_new_tokens=max_new_tokens, ignore_eos=True),
        sampling=SamplingChoice(**sampling),  # type: ignore[arg-type]
    )


async def test_the_null_worker_answers_and_comes_back_from_the_dead(
    tokenizer_folder: Path, assert_eventually: Eventually
) -> None:
    worker = WorkerConfig(engine="null")
    async with serving(tokenizer_folder, llama_facts(), worker, assert_eventually) as front:
        results = await asyncio.gather(*[collect(await front.open(call("hello", 5))) for _ in range(40)])
        assert {result.completions[0].token_ids for result in results} == {(1,) * 5}
        pid = front.status("tiny").worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await assert_eventually(lambda: front.status("tiny").num_deaths == 1)
        await assert_eventually(lambda: front.status("tiny").state == "ready")
        assert (await collect(await front.open(call("hello", 2)))).usage.completion_tokens == 2


@pytest.mark.slow
async def test_a_tiny_model_answers_as_generate_does_alone(tmp_path: Path, assert_eventually: Eventually) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = save_folder(tmp_path / "tiny", byte_level())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["hello world", "The quick brown fox", "émile 🙂", "def f(x):"]
    worker = WorkerConfig(model_folder=folder, threads=1)
    async with serving(folder, read_facts(folder), worker, assert_eventually) as front:
        results = await asyncio.gather(*[collect(await front.open(call(text, 12))) for text in texts])
        sampled = [await collect(await front.open(call("hello", do_sample=True, seed=seed))) for seed in (1, 1, 2)]
    for text, result in zip(texts, results, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
        assert list(result.completions[0].token_ids) == alone
        assert result.completions[0].text == tokenizer.decode(alone, skip_special_tokens=True)
        assert result.usage.prompt_tokens == ids.shape[1]
    drawn = [result.completions[0].token_ids for result in sampled]
    assert drawn[0] == drawn[1] != drawn[2]


FRONT_OF_ITS_OWN = """
import asyncio, pathlib, sys
from unit.inference.conftest import llama_facts
from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.worker_config import WorkerConfig

async def main(folder):
    front = InferenceFront(FrontConfig())
    await front.start()
    worker = WorkerConfig(engine="null")
    front.add_model(ModelPlan(name="tiny", folder=pathlib.Path(folder), facts=llama_facts(), worker=worker))
    async for models in front.subscribe():
        if models[0].state == "ready":
            print(models[0].worker_pid, flush=True)

asyncio.run(main(sys.argv[1]))
"""


async def test_a_killed_front_leaves_no_worker(tokenizer_folder: Path, assert_eventually: Eventually) -> None:
    tests = str(Path(__file__).parents[2])
    front = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FRONT_OF_ITS_OWN, str(tokenizer_folder),
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": tests},
    )  # fmt: skip
    assert front.stdout is not None
    worker_pid = int(await asyncio.wait_for(front.stdout.readline(), 30))
    assert is_alive(worker_pid)
    front.kill()
    await front.wait()
    await assert_eventually(lambda: not is_alive(worker_pid))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["padded", "continuous", "tasks"])
async def test_a_worker_takes_what_is_allowed_for_it_beside_its_model(
    tmp_path: Path, assert_eventually: Eventually, engine: str
) -> None:
    """The system's word for a process that holds next to nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    folder = save_folder(tmp_path / "tiny", byte_level())
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    made = LlamaForSequenceClassification if engine == "tasks" else LlamaForCausalLM
    made(config).save_pretrained(folder)
    tasks = ("text-classification",) if engine == "tasks" else ()
    worker = WorkerConfig(model_folder=folder, engine=engine, tasks=tasks, threads=1)  # type: ignore[arg-type]
    async with serving(folder, read_facts(folder), worker, assert_eventually) as front:
        pid = front.status("tiny").worker_pid
        assert pid is not None
        resident_bytes = psutil.Process(pid).memory_info().rss
    allowed_bytes = process_bytes(engine, on_cpu=True)
    assert 0.75 * allowed_bytes < resident_bytes < allowed_bytes
