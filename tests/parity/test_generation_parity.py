"""The tasks that write text say what the pipelines of transformers 4.57.6 said, through the front and a real worker.

``golden_generation.json`` was written by ``make_golden_generation.py`` in an environment with that release.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.parity.seq2seq_models import MODELS, write_model

from slipstream_server.inference.front import FrontConfig, InferenceFront, ModelPlan
from slipstream_server.inference.task_calls import TaskCall
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.facts import read_facts
from slipstream_server.tasks.items import GeneratedTextResult, TextInput

GOLDEN = json.loads(Path(__file__).with_name("golden_generation.json").read_text(encoding="utf-8"))


async def answers(front: InferenceFront, case: dict[str, Any]) -> list[list[str]]:
    call = TaskCall(task=case["task"], model=case["model"], parameters=case.get("parameters", {}))
    with closing(await front.open_task(call)) as run:
        run.add([TextInput(text) for text in case["texts"]])
        found: dict[int, list[str]] = {}
        for _ in case["texts"]:
            index, outcome = await run.next_result()
            assert isinstance(outcome, GeneratedTextResult), outcome
            found[index] = [text.text for text in outcome.texts]
    return [found[index] for index in range(len(found))]


@pytest.mark.slow
async def test_the_removed_pipelines_live_on(tmp_path: Path, assert_eventually: Callable[..., Awaitable[None]]) -> None:
    assert GOLDEN["transformers"] == "4.57.6"
    front = InferenceFront(FrontConfig())
    await front.start()
    try:
        for kind in MODELS:
            folder = write_model(tmp_path / kind, kind)
            worker = WorkerConfig(model_folder=folder, threads=1)
            front.add_model(ModelPlan(name=kind, folder=folder, facts=read_facts(folder), worker=worker))
        await assert_eventually(lambda: {front.status(kind).state for kind in MODELS} == {"ready"}, timeout_s=120)
        # All at once: requests of many kinds share batches.
        found = await asyncio.gather(*(answers(front, case) for case in GOLDEN["cases"]))
    finally:
        await front.close()
    for case, said in zip(GOLDEN["cases"], found, strict=True):
        assert said == case["answers"], (case["model"], case["task"], case.get("parameters"))
