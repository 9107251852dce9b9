"""What the runner tells while it works: one record per line of the spool file of its attempt.

An attempt's first record is ``started``; its last is ``finished``, ``stopped`` or ``failed``, unless the process was
killed. Numbers that are not finite are written as null. No torch, no files; any thread.
"""

from __future__ import annotations

import time
from typing import Literal

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """``time_s`` is Unix time, for people; order is by place in the file."""

    time_s: float = msgspec.field(default_factory=time.time)


class Started(Event, frozen=True, kw_only=True, tag="started"):
    """The model and data are loaded. ``resumed_from_step`` is 0 for a fresh start."""

    total_steps: int
    resumed_from_step: int
    num_train_examples: int
    num_held_out_examples: int
    num_trainable_parameters: int
    world_size: int
    device: str
    precision: str


class Progress(Event, frozen=True, kw_only=True, tag="progress"):
    """After a step. ``loss`` is the mean since the record before; ``tokens_per_second`` and ``num_tokens`` (all so far)
    count no padding, over all processes.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    tokens_per_second: float
    eta_s: float
    num_tokens: int = 0


class Evaluation(Event, frozen=True, kw_only=True, tag="evaluation"):
    """The held-out rows after ``step`` steps; step 0 is the base model. ``eval_loss`` is the mean over all their
    labels, in nats.
    """

    step: int
    eval_loss: float | None
    perplexity: float | None


class Checkpoint(Event, frozen=True, kw_only=True, tag="checkpoint"):
    """A complete checkpoint; ``name`` is its folder within the job's checkpoints, ``digest`` that of its marker."""

    step: int
    name: str
    digest: str
    size_bytes: int


class Log(Event, frozen=True, kw_only=True, tag="log"):
    """Something a person should know."""

    level: Literal["INFO", "WARNING"]
    message: str


class Stopped(Event, frozen=True, kw_only=True, tag="stopped"):
    """Ended by a signal. ``checkpoint`` names what the next attempt goes on from; empty where there is none yet."""

    step: int
    checkpoint: str


class Finished(Event, frozen=True, kw_only=True, tag="finished"):
    """``result.json`` is written."""

    step: int
    train_loss: float | None
    eval_loss: float | None


class Failed(Event, frozen=True, kw_only=True, tag="failed"):
    """``reason`` is a value of slipstream.type.v1.ErrorReason without its prefix; ``message`` is fit for the user."""

    reason: str
    message: str


AnyEvent = Started | Progress | Evaluation | Checkpoint | Log | Stopped | Finished | Failed

MAX_MESSAGE_CHARACTERS = 2000
