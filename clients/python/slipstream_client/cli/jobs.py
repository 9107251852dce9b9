"""``slipstream jobs``: training jobs, followed and ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from slipstream_client.adapter_results import short_name
from slipstream_client.cli import terminal
from slipstream_client.cli.job_lines import COLOURS, in_time, loss_in_words, outcome
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.cli.watching import end_with, follow
from slipstream_client.client import SlipstreamClient
from slipstream_client.jobs import TrainingJob

app = typer.Typer(no_args_is_help=True, help="Training jobs: list, watch, cancel.")

NameArgument = Annotated[str, typer.Argument(help="Id, or trainingJobs/ID.")]


@app.command("list")
@with_groups
def list_jobs(
    *,
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="The newest so many.", min=1)] = None,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """List the training jobs, newest first."""
    jobs = target.run(lambda client: client.jobs.list(states=state or (), limit=limit))
    if as_json:
        for job in jobs:
            terminal.print_json(job)
    elif jobs:
        terminal.plain_table(_table(jobs))
    else:
        terminal.note("there are no jobs; `slipstream train DATA --base MODEL --adapter NAME` starts one")


def _table(jobs: list[TrainingJob]) -> Table:
    rows = terminal.table("job", "state", "base", "dataset", "steps", "loss", "result", "age", right=("steps", "loss"))
    for job in jobs:
        spec = job.spec or {}
        rows.add_row(
            f"[bold]{escape(job.id)}[/]",
            _state(job),
            escape(str(spec.get("base_model", "")).removeprefix("models/")),
            escape(str((spec.get("dataset") or {}).get("dataset", "")).removeprefix("datasets/")),
            _steps(job),
            f"{job.progress.loss:.4f}" if job.progress and job.progress.loss is not None else "",
            escape(short_name(job.result.adapter_version) or job.result.model) if job.result else "",
            terminal.age(job.create_time),
        )
    return rows


def _state(job: TrainingJob) -> str:
    more = f" [dim]{escape(job.state_message)}[/]" if job.state_message and not job.has_ended else ""
    return f"[{COLOURS.get(job.state, 'bold')}]{job.state or 'unknown'}[/]{more}"


def _steps(job: TrainingJob) -> str:
    if job.progress is None:
        return ""
    return f"{job.progress.step}/{job.progress.total_steps}" if job.progress.total_steps else str(job.progress.step)


@app.command("get")
@with_groups
def get_job(name: NameArgument, *, as_json: terminal.JsonFlag = False, target: Target) -> None:
    """Show one job: what was asked for, how far it is, what came out."""
    job = target.run(lambda client: client.jobs.get(name))
    if as_json:
        terminal.print_json(job)
        return
    terminal.facts(_facts(job))
    if job.has_ended:
        terminal.out.print()
        terminal.out.print(outcome(job))


def _facts(job: TrainingJob) -> list[tuple[str, str]]:
    spec = job.spec or job.evaluation_spec or {}
    method = next((name for name in ("lora", "qlora", "full") if name in spec), "")
    shape = _in_words(spec.get(method) or {})
    began, ended = job.start_time, job.end_time
    ran_s = ((ended or datetime.now(UTC)) - began).total_seconds() if began else None
    result = job.result
    return [
        ("job", f"[bold]{escape(job.id)}[/] {escape(job.display_name)}"),
        ("state", _state(job)),
        ("base", escape(str(spec.get("base_model", "")))),
        ("dataset", escape(_in_words(spec.get("dataset") or {}) if job.spec else str(spec.get("dataset", "")))),
        ("method", escape(f"{method} {shape}".strip())),
        ("hyperparameters", escape(_in_words(spec.get("hyperparameters") or {}))),
        ("publishes", escape(_in_words(spec.get("publish") or {}))),
        ("steps", _steps(job)),
        ("loss", f"{job.progress.loss:.4f}" if job.progress and job.progress.loss is not None else ""),
        (
            "figures",
            loss_in_words(result.baseline_metrics.get("eval_loss"), result.metrics.get("eval_loss")) if result else "",
        ),
        ("rows", f"{result.train_row_count} trained on, {result.evaluation_row_count} held out" if result else ""),
        ("attempts", str(job.attempt_count) if job.attempt_count > 1 else ""),
        ("ran for", in_time(ran_s) if ran_s is not None else ""),
        ("made", f"{terminal.age(job.create_time)} ago" if job.create_time else ""),
        ("by", escape(job.owner)),
    ]


def _in_words(values: Any) -> str:
    """A mapping as ``name value · name value``."""
    if not isinstance(values, dict):
        return str(values)
    return " · ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@app.command("watch")
@with_groups
def watch_job(
    name: NameArgument,
    *,
    after_sequence: Annotated[int, typer.Option(help="Only events after this number.", min=0)] = 0,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Follow a job to its end: progress, loss curve, state changes.

    A lost connection is opened again by itself; Ctrl-C ends the watch and not the job. Exit code 0 when it succeeded.
    """

    async def work(client: SlipstreamClient) -> TrainingJob:
        await client.jobs.get(name)  # a job that does not exist is an error before anything is drawn
        return await follow(client, name, after_sequence=after_sequence, as_json=as_json)

    end_with(target.run(work), as_json=as_json)


@app.command("cancel")
@with_groups
def cancel_job(
    name: NameArgument,
    *,
    grace_s: Annotated[
        float | None, typer.Option("--grace", help="Seconds its processes have to end.", show_default="10")
    ] = None,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """End a job for good; its complete checkpoints stay."""
    job = target.run(lambda client: client.jobs.cancel(name, grace_s=grace_s))
    if as_json:
        terminal.print_json(job)
    elif job.state == "cancelled":
        terminal.out.print(outcome(job))
    else:
        terminal.warn(f"{job.id} is still {job.state}: its processes are being ended")


@app.command("delete")
@with_groups
def delete_job(name: NameArgument, *, as_json: terminal.JsonFlag = False, target: Target) -> None:
    """Delete a job that has ended, with its events and checkpoints; what it published stays."""
    target.run(lambda client: client.jobs.delete(name))
    terminal.deleted(name, as_json)
