"""A job's events, and its end, in lines for people."""

from __future__ import annotations

from rich.text import Text

from slipstream_client.adapter_results import short_name
from slipstream_client.cli import terminal
from slipstream_client.job_events import (
    AliasOutcome,
    AttemptFailed,
    AttemptStarted,
    CheckpointSaved,
    EvaluationCompleted,
    JobEvent,
    LogLine,
    MetricsLogged,
    ResultPublished,
    StateChanged,
)
from slipstream_client.jobs import TrainingJob

COLOURS = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "running": "cyan",
    "starting": "cyan",
    "evaluating": "cyan",
    "publishing": "cyan",
}


def line_of(event: JobEvent, *, with_metrics: bool) -> Text | None:
    """The event in one line; None for what is not worth one. ``with_metrics``: each logged step is."""
    said = _said(event, with_metrics)
    if said is None:
        return None
    word, style, rest = said
    time = event.time.astimezone().strftime("%H:%M:%S")
    line = Text.assemble((time, "dim"), "  ", (f"{word:<11}", style), " ", rest)
    line.rstrip()
    return line


def _said(event: JobEvent, with_metrics: bool) -> tuple[str, str, str] | None:
    match event.payload:
        case StateChanged() as changed:
            why = str(changed.error) if changed.error is not None else changed.state_message
            return changed.state, COLOURS.get(changed.state, "bold"), why
        case AttemptStarted() as started:
            return "attempt", "bold", f"{event.attempt}: {_attempt(started)}"
        case AttemptFailed() as failed:
            fate = "; it is tried again" if failed.will_retry else ""
            return "attempt", "bold yellow", f"{event.attempt} failed: {failed.error}{fate}"
        case MetricsLogged() as logged if with_metrics:
            loss = "not finite" if logged.loss is None else f"{logged.loss:.4f}"
            return "step", "dim", f"{logged.step} · loss {loss} · {logged.tokens_per_second:.0f} tokens/s"
        case EvaluationCompleted() as evaluated:
            return "evaluated", "yellow", _evaluation(evaluated)
        case CheckpointSaved(checkpoint=checkpoint) if checkpoint is not None:
            return "checkpoint", "dim", f"step {checkpoint.step} · {terminal.in_bytes(checkpoint.size_bytes)}"
        case ResultPublished() as published:
            return "published", "green", short_name(published.adapter_version) or published.model
        case AliasOutcome() as outcome:
            return "alias", *alias_in_words(outcome)
        case LogLine(level="warning" | "error") as line:
            return line.level, "yellow" if line.level == "warning" else "red", line.message
    return None


def _attempt(started: AttemptStarted) -> str:
    share = ""
    if started.parameter_count:
        trained = terminal.in_short(started.trainable_parameter_count)
        share = f"{trained} of {terminal.in_short(started.parameter_count)} parameters"
    parts = [
        f"{started.total_steps} steps" if started.total_steps else "",
        f"from step {started.resumed_step}" if started.resumed_step else "",
        f"{started.train_row_count} rows" if started.train_row_count else "",
        share,
        " ".join(filter(None, [" ".join(started.devices), started.data_type])),
    ]
    return " · ".join(filter(None, parts))


def _evaluation(evaluated: EvaluationCompleted) -> str:
    figures = " · ".join(f"{name} {value:.4g}" for name, value in sorted(evaluated.metrics.items()))
    when = f"step {evaluated.step}" if evaluated.step else "base"
    return f"{when} · {figures}{' · best so far' if evaluated.best and evaluated.step else ''}"


def alias_in_words(outcome: AliasOutcome) -> tuple[str, str]:
    """Style and words."""
    name = short_name(outcome.alias)
    if outcome.moved:
        return "green", f"{name} points at it (generation {outcome.generation})"
    return "yellow", f"{name} was not moved: {outcome.error}"


def outcome(job: TrainingJob) -> Text:
    """How an ended job went, in one or two lines."""
    colour = COLOURS.get(job.state, "bold")
    mark = {"succeeded": "✓", "failed": "✗", "cancelled": "⏹"}.get(job.state, "·")
    said = Text.assemble((f"{mark} {job.id} {job.state}", f"bold {colour}"))
    if job.error is not None:
        said.append(f": {job.error}")
    if (result := job.result) is not None:
        parts = [
            f"{result.step_count} steps" if result.step_count else "",
            f"in {in_time(result.run_duration_s)}" if result.run_duration_s else "",
            loss_in_words(result.baseline_metrics.get("eval_loss"), result.metrics.get("eval_loss")),
        ]
        said.append(" · " + " · ".join(filter(None, parts)))
        if made := short_name(result.adapter_version) or result.model:
            said.append("\n  ").append(made, "bold")
        if result.alias is not None:
            style, words = alias_in_words(result.alias)
            said.append(" · ").append(words, style)
    return said


def loss_in_words(before: float | None, after: float | None) -> str:
    """``held-out loss 3.000 → 1.500 (-50%)``."""
    if after is None:
        return ""
    if not before:
        return f"held-out loss {after:.3f}"
    return f"held-out loss {before:.3f} → {after:.3f} ({(after - before) / before:+.0%})"


def in_time(seconds: float) -> str:
    """``1:12`` or ``2:03:00``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
