"""Stands in for the runner where its numbers do not matter: the same arguments, files, events and signals, no model.

``--control DIR`` decides what happens: ``hold-at`` (it stands still from that step on while the file says so),
``fail`` (a reason and a message), ``die-at`` (it kills itself at that step of the attempts below ``die-below``),
``stubborn`` (it ignores SIGTERM), ``child`` (it has a child in a session of its own), ``adapter/`` (what it "trained").
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from slipstream_server.training.checkpoints import complete_checkpoint, keep_newest, last_complete_checkpoint
from slipstream_server.training.events import Checkpoint, Evaluation, Failed, Finished, Progress, Started, Stopped
from slipstream_server.training.job_folder import JobFolder, digest_folder
from slipstream_server.training.recipe import TrainingRecipe, parse_recipe
from slipstream_server.training.result import TrainingResult, write_result
from slipstream_server.training.spool import SpoolWriter


class Runner:
    def __init__(self, folder: JobFolder, attempt: int, control: Path) -> None:
        self.folder, self.attempt, self.control = folder, attempt, control
        self.recipe: TrainingRecipe = parse_recipe(folder.recipe.read_bytes())
        self.spool = SpoolWriter(folder.events(attempt))
        self.is_stopping = False

    def run(self) -> int:
        found = last_complete_checkpoint(self.folder.checkpoints, recipe_digest=self.recipe.digest())
        begin, total = found.step if found else 0, self.recipe.hyperparameters.max_steps or 10
        self.spool.write(_started(begin, total, self.recipe))
        if begin == 0:
            self.spool.write(Evaluation(step=0, eval_loss=2.0, perplexity=None))
        for step in range(begin + 1, total + 1):
            self.step(step, total)
            if self.is_stopping:
                self.save(step)
                self.spool.write(Stopped(step=step, checkpoint=f"checkpoint-{step}"))
                return 75
        return self.finish(total)

    def step(self, step: int, total: int) -> None:
        self.obey(step)
        self.spool.write(_progress(step, total))
        if step % self.recipe.hyperparameters.checkpoint_interval_steps == 0 or step == total:
            self.save(step)

    def obey(self, step: int) -> None:
        while not self.is_stopping and (held := self.said("hold-at")) and step > int(held):
            time.sleep(0.01)
        if (deadly := self.said("die-at")) and step == int(deadly) and self.attempt < int(self.said("die-below") or 99):
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self, step: int) -> None:
        path = self.folder.checkpoints / f"checkpoint-{step}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "state").write_text(str(step))
        sealed = complete_checkpoint(path, recipe_digest=self.recipe.digest())
        self.spool.write(Checkpoint(step=step, name=path.name, digest=sealed.digest, size_bytes=sealed.size_bytes))
        keep_newest(self.folder.checkpoints, self.recipe.hyperparameters.keep_checkpoints)

    def finish(self, total: int) -> int:
        self.spool.write(Evaluation(step=total, eval_loss=1.0, perplexity=None))
        shutil.copytree(self.control / "adapter", self.folder.adapter, dirs_exist_ok=True)
        result = TrainingResult(
            attempt=self.attempt,
            steps=total,
            train_loss=1.5,
            eval_loss_before=2.0,
            eval_loss_after=1.0,
            num_tokens=10 * total,
            num_train_examples=8,
            num_held_out_examples=2,
            num_truncated_examples=0,
            num_trainable_parameters=4,
            seconds=1.0,
            recipe_digest=self.recipe.digest(),
            versions={"python": "3"},
            files=digest_folder(self.folder.adapter),
        )
        write_result(self.folder.result, result)
        self.spool.write(Finished(step=total, train_loss=1.5, eval_loss=1.0))
        while self.said("linger"):
            time.sleep(0.01)
        return 0

    def said(self, name: str) -> str:
        try:
            return (self.control / name).read_text().strip()
        except FileNotFoundError:
            return ""

    def on_signal(self, *_: object) -> None:
        self.is_stopping = not self.said("stubborn")


def _started(begin: int, total: int, recipe: TrainingRecipe) -> Started:
    return Started(
        total_steps=total,
        resumed_from_step=begin,
        num_train_examples=8,
        num_held_out_examples=2,
        num_trainable_parameters=4,
        world_size=recipe.world_size,
        device="cpu",
        precision="float32",
    )


def _progress(step: int, total: int) -> Progress:
    return Progress(
        step=step,
        total_steps=total,
        epoch=step / total,
        loss=1.0 / step,
        learning_rate=0.1,
        grad_norm=None,
        tokens_per_second=10.0,
        eta_s=1.0,
        num_tokens=10 * step,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--control", type=Path, required=True)
    options = parser.parse_args()
    runner = Runner(JobFolder(options.folder), options.attempt, options.control)
    signal.signal(signal.SIGTERM, runner.on_signal)
    if runner.said("child"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    if failure := runner.said("fail"):
        reason, _, message = failure.partition(" ")
        runner.spool.write(Failed(reason=reason, message=message))
        return 70
    return runner.run()


if __name__ == "__main__":
    sys.exit(main())
