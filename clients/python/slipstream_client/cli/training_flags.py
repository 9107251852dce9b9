"""The options of ``train`` that say how it is trained; unset means the service's own default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from slipstream_client.training_options import SpecOptions

TRAINING, ADAPTER, DATA, LOOK = "Training", "Adapter", "Rows", "Evaluation and checkpoints"


def _option(panel: str, help_text: str, *names: str, default: str | bool = False) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=default)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlags:
    """Hyperparameters, shape of the adapter, choice of rows, and how the training is looked after."""

    epochs: Annotated[float | None, _option(TRAINING, "Passes over the rows.", default="3")] = None
    max_steps: Annotated[int | None, _option(TRAINING, "Optimizer steps, in place of epochs.")] = None
    learning_rate: Annotated[float | None, _option(TRAINING, "Highest learning rate.", default="2e-4")] = None
    batch_size: Annotated[int | None, _option(TRAINING, "Rows in a forward pass.", default="8")] = None
    gradient_accumulation_steps: Annotated[
        int | None, _option(TRAINING, "Forward passes for a step.", "--gradient-accumulation", default="1")
    ] = None
    max_length_tokens: Annotated[
        int | None, _option(TRAINING, "Tokens at which rows are cut.", "--max-length", default="1024")
    ] = None
    warmup_fraction: Annotated[
        float | None, _option(TRAINING, "Share of the steps in which the learning rate rises.", "--warmup", default="0")
    ] = None
    scheduler: Annotated[
        str | None,
        _option(TRAINING, "linear, cosine, constant or constant_with_warmup.", default="linear"),
    ] = None
    weight_decay: Annotated[float | None, _option(TRAINING, "Decoupled weight decay.", default="0")] = None
    seed: Annotated[int | None, _option(TRAINING, "Seed of everything.", default="0")] = None
    data_type: Annotated[
        str | None, _option(TRAINING, "float32, bfloat16 or float16.", default="what the device multiplies natively")
    ] = None
    loop: Annotated[str | None, _option(TRAINING, "trainer or native.", default="trainer")] = None
    device: Annotated[str | None, _option(TRAINING, "cpu or cuda.", default="an accelerator if there is one")] = None
    rank: Annotated[int | None, _option(ADAPTER, "Inner dimension of the adapter.", default="8")] = None
    alpha: Annotated[float | None, _option(ADAPTER, "Numerator of its scale.", default="twice the rank")] = None
    dropout: Annotated[float | None, _option(ADAPTER, "Share of its inputs dropped.", default="0")] = None
    target_module: Annotated[
        list[str] | None,
        _option(ADAPTER, "Linear module to adapt; may be repeated.", default="all-linear"),
    ] = None
    initial_adapter: Annotated[str | None, _option(ADAPTER, "Adapter to go on from: NAME@ALIAS or NAME@v3.")] = None
    evaluation_fraction: Annotated[
        float | None, _option(DATA, "Share of the rows held out, where there are none for it.", default="0.1")
    ] = None
    max_train_rows: Annotated[int | None, _option(DATA, "At most so many rows.")] = None
    skip_invalid_rows: Annotated[
        bool, _option(DATA, "Leave out rows that cannot be trained on.", "--skip-invalid-rows")
    ] = False
    train_on_prompt: Annotated[bool, _option(DATA, "Learn the prompt too.", "--train-on-prompt")] = False
    evaluate_every: Annotated[int | None, _option(LOOK, "Steps between two evaluations.", default="at the end")] = None
    checkpoint_every: Annotated[int | None, _option(LOOK, "Steps between two checkpoints.", default="100")] = None
    log_every: Annotated[int | None, _option(LOOK, "Steps between two logged losses.", default="5")] = None

    def options(self) -> SpecOptions:
        """The keyword arguments for the client."""
        return SpecOptions(
            lora={
                "rank": self.rank,
                "alpha": self.alpha,
                "dropout": self.dropout,
                "target_modules": self.target_module or None,
            },
            initial_adapter=self.initial_adapter,
            loop=self.loop,
            hyperparameters={
                "epochs": self.epochs,
                "max_steps": self.max_steps,
                "learning_rate": self.learning_rate,
                "batch_size": self.batch_size,
                "gradient_accumulation_steps": self.gradient_accumulation_steps,
                "max_length_tokens": self.max_length_tokens,
                "warmup_fraction": self.warmup_fraction,
                "scheduler": self.scheduler,
                "weight_decay": self.weight_decay,
                "seed": self.seed,
                "data_type": self.data_type,
                "logging_steps": self.log_every,
            },
            selection={
                "evaluation_fraction": self.evaluation_fraction,
                "max_train_rows": self.max_train_rows,
                "skip_invalid_rows": self.skip_invalid_rows or None,
                "train_on_prompt": self.train_on_prompt or None,
            },
            evaluation={"interval_steps": self.evaluate_every} if self.evaluate_every is not None else None,
            checkpoints={"interval_steps": self.checkpoint_every} if self.checkpoint_every is not None else None,
            resources={"device_type": self.device} if self.device is not None else None,
        )
