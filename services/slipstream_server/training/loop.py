"""The training loop: transformers' Trainer, set up to be repeatable, and what it has to tell and to keep at every step.

Order within a step: log, evaluate, save. The random state in a checkpoint is therefore the one that the next step
begins with, and since whatever is saved has been logged, no loss is lost between checkpoints. Callbacks run on every
process in the same order; where one of them waits for the others, all do. Main thread of the runner.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from peft import PeftModel
from transformers import (
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from slipstream_server.errors import InvalidField
from slipstream_server.training.checkpoints import complete_checkpoint, keep_newest
from slipstream_server.training.dataset import IGNORED_LABEL, ExampleDataset, PaddedCollator
from slipstream_server.training.events import Checkpoint, Evaluation, Progress
from slipstream_server.training.model import Placement
from slipstream_server.training.recipe import TrainingRecipe
from slipstream_server.training.reporting import Reporter, finite
from slipstream_server.training.stopping import StopSignal

# Mean loss over all held-out labels. The Trainer's own eval_loss averages the means of batches, so it changes with the
# batch size.
_LABEL_LOSS = "label_loss"
_EVAL_LOSS = f"eval_{_LABEL_LOSS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopInputs:
    """What a loop is built of. ``held_out`` may be empty."""

    model: PeftModel
    train: ExampleDataset
    held_out: ExampleDataset
    pad_token_id: int
    checkpoints: Path
    is_resumed: bool


def build_trainer(
    inputs: LoopInputs, recipe: TrainingRecipe, placement: Placement, reporter: Reporter, stop: StopSignal
) -> Trainer:
    """A Trainer that is ready to train, and that reports, saves and stops as a job should."""
    trainer = Trainer(
        model=inputs.model,
        args=_arguments(inputs, recipe, placement),
        data_collator=PaddedCollator(pad_token_id=inputs.pad_token_id),
        train_dataset=inputs.train,
        eval_dataset=inputs.held_out if len(inputs.held_out) else None,
        preprocess_logits_for_metrics=row_losses,
        compute_metrics=_mean_label_loss,
        callbacks=[
            _Stopping(stop),
            _Telling(reporter),
            _Keeping(reporter, recipe.digest(), recipe.hyperparameters.keep_checkpoints),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _arguments(inputs: LoopInputs, recipe: TrainingRecipe, placement: Placement) -> TrainingArguments:
    chosen = recipe.hyperparameters
    total_steps, warmup_steps = chosen.schedule(num_examples=len(inputs.train), world_size=recipe.world_size)
    has_held_out = len(inputs.held_out) > 0
    is_evaluated_between = has_held_out and chosen.evaluation_interval_steps is not None
    return TrainingArguments(
        output_dir=str(inputs.checkpoints),
        max_steps=total_steps,
        per_device_train_batch_size=chosen.batch_size_per_device,
        per_device_eval_batch_size=chosen.batch_size_per_device,
        gradient_accumulation_steps=chosen.gradient_accumulation_steps,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.scheduler,
        warmup_steps=warmup_steps,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm,
        optim="adamw_torch",
        seed=chosen.seed,
        data_seed=chosen.seed,
        accelerator_config={"use_seedable_sampler": True},
        use_cpu=placement.use_cpu,
        bf16=placement.use_bfloat16,
        logging_strategy="steps",
        logging_steps=chosen.logging_interval_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if is_evaluated_between else "no",
        eval_steps=chosen.evaluation_interval_steps,
        eval_on_start=has_held_out and not inputs.is_resumed,
        prediction_loss_only=False,
        save_strategy="steps",
        save_steps=chosen.checkpoint_interval_steps,
        save_total_limit=None,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not placement.use_cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )


def row_losses(logits: torch.Tensor | Sequence[torch.Tensor], labels_BT: torch.Tensor) -> torch.Tensor:
    """Per row the sum of its labels' losses and their number, [B, 2]; row by row, because float32 logits of a batch are
    large.
    """
    logits_BTV = logits if isinstance(logits, torch.Tensor) else logits[0]
    sums = [
        torch.nn.functional.cross_entropy(
            logits_TV[:-1].float(), labels_T[1:], ignore_index=IGNORED_LABEL, reduction="sum"
        )
        for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True)
    ]
    return torch.stack([torch.stack(sums), (labels_BT[:, 1:] != IGNORED_LABEL).sum(dim=1).float()], dim=1)


def _mean_label_loss(prediction: EvalPrediction) -> dict[str, float]:
    total, count = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {_LABEL_LOSS: float(total / count)}


def train_loss(state: TrainerState) -> float | None:
    """The mean over all steps, those of earlier attempts included."""
    total, last_step = 0.0, 0
    for record in state.log_history:
        if "loss" in record:
            total += record["loss"] * (record["step"] - last_step)
            last_step = record["step"]
    return finite(total / last_step) if last_step else None


def eval_loss(state: TrainerState, step: int) -> float | None:
    """The held-out loss after ``step`` steps, None where it was not measured."""
    found = [record[_EVAL_LOSS] for record in state.log_history if record["step"] == step and _EVAL_LOSS in record]
    return finite(found[-1]) if found else None


class _Stopping(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in which a signal came, with a checkpoint; all processes after the same step."""

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if _any_process(self._stop.is_requested, args.device):
            self._stop.is_requested = True
            control.should_save = True
            control.should_training_stop = True
        control.should_log = control.should_log or control.should_save or control.should_evaluate
        return control


class _Telling(TrainerCallback):  # type: ignore[misc]
    """Turns the Trainer's records into events, and ends a training that has left the numbers."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._clock = _Clock()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock.start(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: Any,
    ) -> None:
        if "loss" not in logs:
            return
        tokens_per_second, eta_s = self._clock.measure(state)
        progress = Progress(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch or 0.0,
            loss=finite(logs["loss"]),
            learning_rate=logs["learning_rate"],
            grad_norm=finite(logs.get("grad_norm")),
            tokens_per_second=tokens_per_second,
            eta_s=eta_s,
            num_tokens=int(state.num_input_tokens_seen),
        )
        self._reporter.tell(progress)
        if progress.loss is None:
            message = f"the loss is not a finite number at step {state.global_step}; a lower learning rate may help"
            raise InvalidField.of("hyperparameters.learning_rate", message)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **_: Any,
    ) -> None:
        self._clock.leave_out_pause()
        loss = metrics[_EVAL_LOSS]
        perplexity = float(np.exp(min(loss, 700.0)))
        self._reporter.tell(Evaluation(step=state.global_step, eval_loss=finite(loss), perplexity=finite(perplexity)))


class _Clock:
    """Speed since the last record, and the time left at the speed since the beginning; evaluations do not count."""

    def __init__(self) -> None:
        self._begin = self._last = (0.0, 0, 0.0)

    def start(self, state: TrainerState) -> None:
        self._begin = self._last = self._now(state)

    def measure(self, state: TrainerState) -> tuple[float, float]:
        """``(tokens per second, seconds left)``."""
        now = self._now(state)
        seconds, steps = now[0] - self._begin[0], now[1] - self._begin[1]
        speed = (now[2] - self._last[2]) / max(now[0] - self._last[0], 1e-9)
        self._last = now
        return speed, (state.max_steps - state.global_step) * seconds / max(steps, 1)

    def leave_out_pause(self) -> None:
        """The time since the last record was no training. A record is made before every evaluation."""
        pause = time.monotonic() - self._last[0]
        self._begin = (self._begin[0] + pause, *self._begin[1:])
        self._last = (self._last[0] + pause, *self._last[1:])

    @staticmethod
    def _now(state: TrainerState) -> tuple[float, int, float]:
        return time.monotonic(), state.global_step, float(state.num_input_tokens_seen)


class _Keeping(TrainerCallback):  # type: ignore[misc]
    """Seals what the Trainer saved, and keeps the newest few."""

    def __init__(self, reporter: Reporter, recipe_digest: str, keep: int) -> None:
        self._reporter, self._recipe_digest, self._keep = reporter, recipe_digest, keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        wait_for_all()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        path = folder / f"checkpoint-{state.global_step}"
        checkpoint = complete_checkpoint(path, recipe_digest=self._recipe_digest)
        event = Checkpoint(
            step=checkpoint.step, name=path.name, digest=checkpoint.digest, size_bytes=checkpoint.size_bytes
        )
        self._reporter.tell(event)
        keep_newest(folder, self._keep)


def wait_for_all() -> None:
    """Return when every process of the job has come here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _any_process(flag: bool, device: torch.device) -> bool:
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())
