"""One attempt at a training job, from its recipe to ``result.json``: load, resume, train, evaluate, write.

    load model and data -> newest complete checkpoint, if any -> train (a signal: checkpoint, then stop)
    -> last evaluation -> adapter -> result

Everything that decides the numbers comes from the recipe and its seed, so that an attempt that goes on from a
checkpoint ends where the uninterrupted one would have ended. Main thread of the runner; imports torch.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import accelerate
import peft
import torch
import transformers
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from slipstream_server.errors import InternalError, InvalidField
from slipstream_server.training.adapter_output import write_adapter
from slipstream_server.training.checkpoints import CompleteCheckpoint, discard_after, last_complete_checkpoint
from slipstream_server.training.dataset import ExampleDataset, JobData, load_data
from slipstream_server.training.events import Finished, Started
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.loop import LoopInputs, build_trainer, eval_loss, train_loss, wait_for_all
from slipstream_server.training.model import Placement, choose_placement, load_base, put_adapter_on
from slipstream_server.training.recipe import TrainingRecipe
from slipstream_server.training.reporting import Reporter
from slipstream_server.training.result import TrainingResult, write_result
from slipstream_server.training.stopping import StopRequested, StopSignal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What one run of the runner was told."""

    number: int
    recipe: TrainingRecipe
    folder: JobFolder
    reporter: Reporter
    stop: StopSignal


def run_job(attempt: Attempt) -> None:
    """Train and write everything; raises StopRequested after a signal, and whatever goes wrong."""
    begin = time.monotonic()
    recipe = attempt.recipe
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    placement = choose_placement(recipe)
    base, tokenizer = load_base(recipe, placement)
    _check_context(base, recipe)
    data = load_data(recipe, tokenizer)
    checkpoint = last_complete_checkpoint(attempt.folder.checkpoints, recipe_digest=recipe.digest())
    model = put_adapter_on(base, recipe, checkpoint.path if checkpoint else None)
    inputs = LoopInputs(
        model=model,
        train=ExampleDataset(data.train),
        held_out=ExampleDataset(data.held_out),
        pad_token_id=tokenizer.pad_token_id,
        checkpoints=attempt.folder.checkpoints,
        is_resumed=checkpoint is not None,
    )
    trainer = build_trainer(inputs, recipe, placement, attempt.reporter, attempt.stop)
    _check_world_size(trainer, recipe)
    if trainer.is_world_process_zero():
        discard_after(attempt.folder.checkpoints, checkpoint.step if checkpoint else 0)
    wait_for_all()
    _tell_start(attempt, data, trainer, placement, checkpoint)
    _train(trainer, attempt.stop, checkpoint)
    _evaluate_at_the_end(trainer)
    if trainer.is_world_process_zero():
        _write_outcome(attempt, trainer, data, seconds=time.monotonic() - begin)
    wait_for_all()


def _train(trainer: Trainer, stop: StopSignal, checkpoint: CompleteCheckpoint | None) -> None:
    """All steps that are left. A checkpoint of the last step leaves none, and the Trainer would take one more."""
    if checkpoint is not None and checkpoint.step >= trainer.args.max_steps:
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))
        return
    with stop.deferred():
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    if stop.is_requested:
        raise StopRequested
    if trainer.state.global_step != trainer.args.max_steps:
        raise InternalError(f"training ended after {trainer.state.global_step} of {trainer.args.max_steps} steps")


def _evaluate_at_the_end(trainer: Trainer) -> None:
    if trainer.eval_dataset is not None and eval_loss(trainer.state, trainer.state.global_step) is None:
        trainer.evaluate()


def _write_outcome(attempt: Attempt, trainer: Trainer, data: JobData, *, seconds: float) -> None:
    recipe, state = attempt.recipe, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    files = write_adapter(model, attempt.folder.adapter, base_model_name=recipe.base_model_name)
    result = TrainingResult(
        attempt=attempt.number,
        steps=state.global_step,
        train_loss=train_loss(state),
        eval_loss_before=eval_loss(state, 0),
        eval_loss_after=eval_loss(state, state.global_step),
        num_tokens=int(state.num_input_tokens_seen),
        num_train_examples=len(data.train),
        num_held_out_examples=len(data.held_out),
        num_truncated_examples=data.num_truncated,
        num_trainable_parameters=_num_trainable(model),
        seconds=seconds,
        recipe_digest=recipe.digest(),
        versions=_versions(),
        files=files,
    )
    with attempt.stop.deferred():
        write_result(attempt.folder.result, result)
        attempt.reporter.tell(
            Finished(step=result.steps, train_loss=result.train_loss, eval_loss=result.eval_loss_after)
        )


def _tell_start(
    attempt: Attempt, data: JobData, trainer: Trainer, placement: Placement, checkpoint: CompleteCheckpoint | None
) -> None:
    attempt.reporter.tell(
        Started(
            total_steps=trainer.args.max_steps,
            resumed_from_step=checkpoint.step if checkpoint else 0,
            num_train_examples=len(data.train),
            num_held_out_examples=len(data.held_out),
            num_trainable_parameters=_num_trainable(trainer.model),
            world_size=trainer.args.world_size,
            device=placement.device,
            precision=placement.precision,
        )
    )
    if data.num_truncated:
        max_length = attempt.recipe.hyperparameters.max_length
        attempt.reporter.warn(
            f"{data.num_truncated} rows are longer than max_length ({max_length} tokens) and were cut"
        )
    if data.num_answers_left_out:
        attempt.reporter.warn(
            f"{data.num_answers_left_out} earlier answers are context only: they were cut, or the model's template "
            "shows them differently once the conversation goes on"
        )


def _check_context(base: Any, recipe: TrainingRecipe) -> None:
    context = getattr(base.config, "max_position_embeddings", None)
    max_length = recipe.hyperparameters.max_length
    if isinstance(context, int) and max_length > context:
        raise InvalidField.of(
            "hyperparameters.max_length", f"{max_length} exceeds the model's context of {context} tokens"
        )


def _check_world_size(trainer: Trainer, recipe: TrainingRecipe) -> None:
    """A launcher that starts fewer processes than it was told to says nothing; the batch would silently be another."""
    if trainer.args.world_size != recipe.world_size or trainer.args.n_gpu > 1:
        found = trainer.args.world_size
        raise InvalidField.of(
            "world_size", f"the recipe expects {recipe.world_size} processes, the launcher started {found}"
        )


def _num_trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "peft": peft, "accelerate": accelerate}
    return {"python": platform.python_version(), **{name: str(module.__version__) for name, module in modules.items()}}
