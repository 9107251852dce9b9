"""From a worker's configuration to a task engine that answers: the head that its tasks need, tokenizer or processors,
packing, a first pass, and the facts of it all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from slipstream_server.errors import ModelLoadFailed
from slipstream_server.inference.engine.packing import pack_linears, packed_bytes
from slipstream_server.inference.engine.side_by_side import SideBySide, run_together
from slipstream_server.inference.engine.tasks import TaskEngine
from slipstream_server.inference.generation import Ready
from slipstream_server.inference.worker_config import WorkerConfig
from slipstream_server.models.loading import LoadedModel, load_model
from slipstream_server.tasks.batching import TaskLimits
from slipstream_server.tasks.items import TextInput
from slipstream_server.tasks.runner import Runner
from slipstream_server.tasks.text.runners import load_tokenizer, text_runner
from slipstream_server.tasks.text_specs import TEXT_TASKS

Report = Callable[[float, str], None]

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
    if config.model_folder is None or not config.tasks:
        raise ModelLoadFailed("no model folder is given" if config.tasks else "no task is given")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    # Every operation of torch lets go of the interpreter; a side thread that computes would keep it for 5 ms each time.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    report(0.0, "reading weights")
    # All tasks of one worker are of one head.
    loaded = load_model(config.model_folder, replace(config.load, task=config.load.task or config.tasks[0]))
    report(0.8, "preparing the model")
    packed = pack_linears(loaded.model) if config.packed_linears and loaded.device.type == "cpu" else 0
    runners = runners_for(config.tasks, loaded, config.model_folder)
    report(0.9, "first pass")
    for task_id, runner in runners.items():
        _warm_up(task_id, runner)
    is_text_on_cpu = loaded.device.type == "cpu" and TEXT_TASK_IDS.issuperset(config.tasks)
    engine = TaskEngine(
        runners,
        task_limits(config, loaded.device),
        wake=wake,
        counting_tasks=TEXT_TASK_IDS,
        run=SideBySide().run if is_text_on_cpu else run_together,
    )
    return engine, _ready(loaded, config, packed)


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


def _ready(loaded: LoadedModel, config: WorkerConfig, num_packed: int) -> Ready:
    return Ready(
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        attention=loaded.attn_implementation,
        batching="tasks",
        memory_bytes=loaded.memory_bytes + packed_bytes(loaded.model),
        settings={
            "tasks": ",".join(config.tasks),
            "threads": str(torch.get_num_threads()),
            "packed_linears": str(num_packed),
            "max_batch_size": str(config.max_batch_size),
            "max_batch_tokens": str(task_limits(config, loaded.device).max_batch_tokens),
            "max_queue_delay_ms": f"{config.max_queue_delay_ms:g}",
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    )
