"""From a worker's configuration to a task engine that answers: the head that its tasks need, tokenizer or processors,
a first pass, and the facts of it all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slipstream_server.errors import ModelLoadFailed
from slipstream_server.inference.engine.side_by_side import SideBySide, may_run_side_by_side, run_together
from slipstream_server.inference.engine.tasks import TaskEngine
from slipstream_server.inference.engine.worker_model import Report, load_worker_model
from slipstream_server.inference.generation import Ready
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.loading import LoadedModel
from slipstream_server.tasks.batching import TaskLimits
from slipstream_server.tasks.items import TextInput
from slipstream_server.tasks.runner import Runner
from slipstream_server.tasks.text.runners import load_tokenizer, text_runner
from slipstream_server.tasks.text_specs import TEXT_TASKS

TEXT_TASK_IDS = frozenset(spec.id for spec in TEXT_TASKS)
_CPU_SATURATING_TOKENS = 512
_DEVICE_SATURATING_TOKENS = 8192
# Whoever comes next waits for the batch that runs. With MiniLM four times as many tokens go through 4% faster at best,
# and take four times as long: 1.15 s instead of 0.3 s on one core.
_CPU_BATCH_TOKENS = 1024
_SWITCH_INTERVAL_S = 0.0005
_WARM_UP_TEXT = "The quick brown fox jumps over the lazy dog."


def assemble_tasks(config: WorkerConfig, report: Report, wake: Callable[[], None]) -> tuple[TaskEngine, Ready]:
    """Load the model and build its engine; ``wake`` is called from other threads when a step is due.

    Raises a SlipstreamError that says why it cannot be.
    """
    # Every operation of torch lets go of the interpreter; a side thread that computes would keep it for 5 ms each time.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # All tasks of one worker are of one head.
    model = load_worker_model(config, replace(config.load, task=config.load.task or config.tasks[0]), report)
    loaded = model.loaded
    runners = runners_for(config.tasks, loaded, model.folder)
    report(0.9, "first pass")
    for task_id, runner in runners.items():
        _warm_up(task_id, runner)
    is_text_on_cpu = loaded.device.type == "cpu" and TEXT_TASK_IDS.issuperset(config.tasks)
    in_parts = is_text_on_cpu and may_run_side_by_side(loaded.model, config.tasks)
    limits = task_limits(config, loaded.device)
    engine = TaskEngine(
        runners,
        limits,
        wake=wake,
        counting_tasks=TEXT_TASK_IDS,
        run=SideBySide().run if in_parts else run_together,
    )
    return engine, model.ready(config, tasks=",".join(config.tasks), max_batch_tokens=str(limits.max_batch_tokens))


def runners_for(task_ids: Sequence[str], loaded: LoadedModel, folder: Path) -> dict[str, Runner]:
    """A runner for each task on the loaded model."""
    is_text = any(task_id in TEXT_TASK_IDS for task_id in task_ids)
    tokenizer = load_tokenizer(folder) if is_text else None
    return {task_id: runner_for(task_id, loaded, folder, tokenizer) for task_id in task_ids}


def runner_for(task_id: str, loaded: LoadedModel, folder: Path, tokenizer: Any = None) -> Runner:
    """The runner of one task: on text, or on pictures, sounds, films and documents."""
    if task_id in TEXT_TASK_IDS:
        context = loaded.facts.context_tokens
        return text_runner(task_id, loaded.model, folder, loaded.device, context_tokens=context, tokenizer=tokenizer)
    from slipstream_server.tasks.media.runners import media_runner

    return media_runner(task_id, loaded.model, folder, loaded.device)


def task_limits(config: WorkerConfig, device: torch.device) -> TaskLimits:
    """The worker's batch limits as the task engine reads them."""
    most = _CPU_BATCH_TOKENS if device.type == "cpu" else config.max_batch_tokens
    return TaskLimits(
        max_batch_size=config.max_batch_size,
        max_batch_tokens=min(config.max_batch_tokens, config.max_step_tokens or most),
        max_queue_delay_ms=config.max_queue_delay_ms,
        saturating_tokens=_CPU_SATURATING_TOKENS if device.type == "cpu" else _DEVICE_SATURATING_TOKENS,
    )


def _warm_up(task_id: str, runner: Runner) -> None:
    """One pass over a short text, where the task reads plain text, so that a broken model is found out now."""
    if task_id not in TEXT_TASK_IDS or task_id in _NEED_MORE_THAN_TEXT:
        return
    item = TextInput(_WARM_UP_TEXT)
    try:
        pieces = runner.prepare(item, {})
        with torch.inference_mode():
            runner.finish(item, {}, runner.run(pieces))
    except Exception as error:
        raise ModelLoadFailed(f"the model's first pass failed ({type(error).__name__})") from error


_NEED_MORE_THAN_TEXT = frozenset(
    spec.id for spec in TEXT_TASKS if TextInput.KIND not in spec.input_kinds or spec.id == "fill-mask"
)
