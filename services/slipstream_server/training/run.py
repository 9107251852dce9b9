"""The runner's entry: ``accelerate launch ... -m slipstream_server.training.run --recipe FILE --attempt N --folder
DIR``.

Reads the recipe, prepares the process before torch is imported, runs the job and says how it ended: as the last event
of the spool and as the exit status. One runner at a time works in a job's folder: the lock is the kernel's and dies
with the process. Main thread only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from slipstream_server.errors import InvalidField, WrongState
from slipstream_server.logs import configure_logging
from slipstream_server.training.checkpoints import discard_unmarked, last_complete_checkpoint
from slipstream_server.training.events import Finished, Stopped
from slipstream_server.training.failures import ExitStatus, classify
from slipstream_server.training.job_folder import JobFolder
from slipstream_server.training.recipe import TrainingRecipe, parse_recipe
from slipstream_server.training.reporting import Reporter
from slipstream_server.training.result import read_result
from slipstream_server.training.spool import SpoolWriter
from slipstream_server.training.stopping import StopRequested, StopSignal

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one attempt; the exit status."""
    options = _parse(arguments)
    configure_logging()
    folder = JobFolder(options.folder)
    stop = StopSignal()
    stop.install()
    try:
        with SpoolWriter(folder.events(options.attempt)) as spool:
            reporter = Reporter(spool, is_main_process=_rank() == 0)
            return _attempt(options, folder, reporter, stop)
    except (OSError, StopRequested) as error:
        logger.error("the attempt ended before it could say so: %s", type(error).__name__)
        return ExitStatus.STOPPED if isinstance(error, StopRequested) else classify(error).exit_status


def _attempt(options: argparse.Namespace, folder: JobFolder, reporter: Reporter, stop: StopSignal) -> int:
    recipe: TrainingRecipe | None = None
    try:
        with _sole_runner(folder):
            recipe = parse_recipe(options.recipe.read_bytes())
            _run(options.attempt, recipe, folder, reporter, stop)
        return ExitStatus.FINISHED
    except StopRequested:
        found = last_complete_checkpoint(folder.checkpoints, recipe_digest=recipe.digest()) if recipe else None
        reporter.tell(Stopped(step=found.step if found else 0, checkpoint=found.path.name if found else ""))
        return ExitStatus.STOPPED
    except Exception as error:
        failure = classify(error)
        if _rank() == 0 and failure.exit_status is ExitStatus.STORAGE_FULL:
            # What the write that failed left behind is worth nothing, and the report needs a little room.
            discard_unmarked(folder.checkpoints)
        reporter.fail(failure)
        return failure.exit_status


def _run(attempt: int, recipe: TrainingRecipe, folder: JobFolder, reporter: Reporter, stop: StopSignal) -> None:
    result = read_result(folder.result)
    if result is not None and result.recipe_digest == recipe.digest():
        # An attempt that was killed between its result and its last event.
        reporter.tell(Finished(step=result.steps, train_loss=result.train_loss, eval_loss=result.eval_loss_after))
        return
    _check_processes(recipe)
    _prepare_process(recipe)
    from slipstream_server.training.job import Attempt, run_job

    run_job(Attempt(number=attempt, recipe=recipe, folder=folder, reporter=reporter, stop=stop))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slipstream_server.training.run", description="Train one job.")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe, as JSON")
    parser.add_argument("--attempt", type=int, required=True, help="the number of this attempt, from 1")
    parser.add_argument("--folder", type=Path, required=True, help="the job's folder")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _sole_runner(folder: JobFolder) -> Iterator[None]:
    """Hold the job's lock; the first process holds it for all of the job."""
    if _rank() != 0:
        yield
        return
    lock = os.open(folder.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WrongState("another attempt at this job is still running", metadata={"state": "RUNNING"}) from error
        yield
    finally:
        os.close(lock)


def _check_processes(recipe: TrainingRecipe) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != recipe.world_size:
        message = f"the recipe expects {recipe.world_size} processes, the launcher started {started}"
        raise InvalidField.of("world_size", message)


def _prepare_process(recipe: TrainingRecipe) -> None:
    """What torch and the tokenizers read when they are imported. Launchers set one thread where they know nothing
    better.
    """
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = recipe.cpu_threads or max(1, len(os.sched_getaffinity(0)) // local_processes)
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        # Threads that wait by spinning take the cores of whoever else runs here, a serving worker for one.
        OMP_WAIT_POLICY="PASSIVE",
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
    )
    if recipe.world_size == 1:
        # A single process that sees several GPUs would spread its batches over them, and train with another batch size.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
