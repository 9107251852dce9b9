"""The picture that ``slipstream top`` draws: services in the head, then the models.

A model is a card of some lines where all of them fit the height of the terminal, else one line of a table. Everything
can be read without colour, and in 80 columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from slipstream_client.cli import terminal
from slipstream_client.cli.model_rows import COLOURS
from slipstream_client.cli.top_figures import Latency, ModelFigures, TaskFigures
from slipstream_client.models import Model
from slipstream_client.results import HealthState, ServiceHealth

UNKNOWN = "–"
BAR_WIDTH = 16
SPARK_WIDTH = 30
FULL, EMPTY, LEVELS = "█", "░", "▁▂▃▄▅▆▇█"
CARD_LINES = 8
HEAD_LINES = 4
MARKS = {
    HealthState.SERVING: ("●", "green", ""),
    HealthState.NOT_SERVING: ("◐", "yellow", "not serving"),
    HealthState.UNKNOWN: ("?", "yellow", "unknown"),
    HealthState.UNREACHABLE: ("○", "red", "not running"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """All that is shown at one moment. ``problem``: why there are no figures, empty where there are."""

    time: datetime
    services: tuple[ServiceHealth, ...]
    models: tuple[Model, ...]
    figures: tuple[ModelFigures, ...]
    problem: str = ""


class TopView:
    """A frame as something rich can draw."""

    def __init__(self, frame: Frame, *, note: str = "") -> None:
        self._frame = frame
        self._note = note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        models = {model.id: model for model in self._frame.models}
        figures = {each.model: each for each in self._frame.figures}
        names = sorted(models.keys() | figures.keys())
        yield _title(self._frame, self._note)
        yield _services(self._frame.services)
        if self._frame.problem:
            yield Text(self._frame.problem, style="yellow")
        yield Text()
        if not names:
            yield Text("no models", style="dim")
        elif _height(figures, names) <= options.max_height or not console.is_terminal:
            yield from (_card(name, models.get(name), figures.get(name)) for name in names)
        else:
            yield _table(names, models, figures)


def _height(figures: Mapping[str, ModelFigures], names: Iterable[str]) -> int:
    return HEAD_LINES + sum(CARD_LINES if name in figures else 2 for name in names)


def _title(frame: Frame, note: str) -> RenderableType:
    address = frame.services[0].address if frame.services else ""
    words = filter(None, [address, frame.time.astimezone().strftime("%H:%M:%S"), note])
    return Text.assemble(("slipstream top", "bold"), (" · " + " · ".join(words), "dim"))


def _services(services: Iterable[ServiceHealth]) -> Text:
    line = Text()
    for service in services:
        mark, colour, words = MARKS[service.state]
        latency = "" if service.latency_ms is None else f"{service.latency_ms:.0f} ms"
        line.append(mark, colour).append(f" {service.service} ").append(words or latency, "dim").append("   ")
    return line


def _card(name: str, model: Model | None, figures: ModelFigures | None) -> RenderableType:
    title = _model_title(name, model)
    if figures is None:
        return Group(title, Text())
    rows = Table.grid(padding=(0, 2, 0, 0))
    for label, value in _lines(figures):
        value.truncate(65, overflow="ellipsis")
        rows.add_row(Text(f"  {label}", "dim"), value)
    return Group(title, rows, Text())


def _model_title(name: str, model: Model | None) -> Text:
    title = Text(name, "bold cyan")
    if model is None:
        return title
    title.append(f"  {model.state}", COLOURS.get(model.state, "dim"))
    memory = terminal.in_bytes(model.memory_bytes) if model.memory_bytes else ""
    facts = [" ".join(model.devices), model.data_type, model.batching, memory, model.note]
    return title.append("".join(f" · {fact}" for fact in facts if fact), "dim")


def _lines(f: ModelFigures) -> list[tuple[str, Text]]:
    if f.tasks is not None:
        return [
            ("batch", _batch(f)),
            ("inputs", _rate(f.tasks.inputs_per_s, "in/s", f.tasks.history)),
            ("tokens", _rate(f.prompt_tokens_per_s, "tok/s", f.prompt_history)),
            ("latency", _task_latency(f.tasks)),
            ("tasks", _outcomes(f.tasks.num_answered, f.tasks.num_failed, f)),
        ]
    return [
        ("batch", _batch(f)),
        ("KV cache", _kv(f)),
        ("output", _output(f)),
        ("prompt", _rate(f.prompt_tokens_per_s, "tok/s", f.prompt_history)),
        ("latency", _latency(f)),
        ("requests", _requests(f)),
        *([("adapters", _adapters(f))] if f.adapter_slots else []),
    ]


def _batch(f: ModelFigures) -> Text:
    rows = float(f.num_running) if f.batch_rows is None else f.batch_rows
    full = rows / f.max_batch_size if f.max_batch_size else 0.0
    text = bar(full)
    text.append(f" {rows:.3g} of {f.max_batch_size} rows", "bold")
    text.append(f"  {f.num_running} running  ")
    return text.append(f"{f.num_waiting} waiting", "yellow" if f.num_waiting else "")


def _kv(f: ModelFigures) -> Text:
    tokens = terminal.in_short(f.kv_tokens)
    if f.kv_usage_ratio is None:
        text = Text(f"{tokens} tokens", "bold")
    else:
        text = bar(f.kv_usage_ratio).append(f" {f.kv_usage_ratio:.0%}", "bold")
        text.append(f"  {tokens} of {terminal.in_short(f.kv_capacity_tokens)} tokens")
    if f.prefix_hit_ratio is not None:
        text.append(f"  prefix hits {f.prefix_hit_ratio:.0%}")
    return text


def _rate(per_s: float | None, unit: str, history: tuple[float, ...]) -> Text:
    text = Text().append(f"{UNKNOWN if per_s is None else in_rate(per_s):>6} {unit:<5}  ", "bold")
    return text.append(sparkline(history), "green")


def _output(f: ModelFigures) -> Text:
    text = _rate(f.generation_tokens_per_s, "tok/s", f.generation_history)
    if f.draft_acceptance_ratio is not None:
        text.append(f"  drafts {f.draft_acceptance_ratio:.0%} accepted")
    return text


def _latency(f: ModelFigures) -> Text:
    text = Text("first token ").append(_quantiles(f.first_token), "bold")
    return text.append("   next ").append(_quantiles(f.inter_token), "bold").append("   p50 / p99", "dim")


def _task_latency(tasks: TaskFigures) -> Text:
    text = Text("result ").append(_quantiles(tasks.latency), "bold")
    return text.append("   queue ").append(_quantiles(tasks.queue_time), "bold").append("   p50 / p99", "dim")


def _quantiles(latency: Latency) -> str:
    return f"{in_time(latency.p50_s)} / {in_time(latency.p99_s)}"


def _requests(f: ModelFigures) -> Text:
    return _outcomes(f.num_succeeded, f.num_failed, f, f"  {terminal.in_short(f.num_preemptions)} preempted")


def _outcomes(num_done: int, num_failed: int, f: ModelFigures, more: str = "") -> Text:
    text = Text(f"{terminal.in_short(num_done)} done  ")
    text.append(f"{terminal.in_short(num_failed)} failed", "red" if num_failed else "").append(more)
    return text.append(f"  {f.num_worker_restarts} restarts", "red" if f.num_worker_restarts else "")


def _adapters(f: ModelFigures) -> Text:
    text = Text(f"{len(f.running_adapters)} of {f.adapter_slots} in use")
    if f.running_adapters:
        text.append("  " + " ".join(f.running_adapters), "cyan")
    if f.waiting_adapters:
        text.append("  waiting: ", "dim").append(" ".join(f.waiting_adapters), "yellow")
    return text


def _table(names: list[str], models: Mapping[str, Model], figures: Mapping[str, ModelFigures]) -> Table:
    numbers = ("batch", "queue", "KV", "tok/s", "TTFT", "p99", "failed")
    rows = terminal.table("model", "state", *numbers, right=numbers)
    for column in rows.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for name in names:
        model = models.get(name)
        state = Text(model.state, COLOURS.get(model.state, "dim")) if model else Text(UNKNOWN)
        cells = _cells(figures[name]) if name in figures else []
        rows.add_row(Text(name, "bold"), state, *cells)
    return rows


def _cells(f: ModelFigures) -> list[str]:
    queue = [f"{f.num_running}/{f.max_batch_size}", str(f.num_waiting)]
    if f.tasks is not None:
        tokens = UNKNOWN if f.prompt_tokens_per_s is None else in_rate(f.prompt_tokens_per_s)
        latency = f.tasks.latency
        return [*queue, "", tokens, in_time(latency.p50_s), in_time(latency.p99_s), str(f.tasks.num_failed)]
    return [
        *queue,
        UNKNOWN if f.kv_usage_ratio is None else f"{f.kv_usage_ratio:.0%}",
        UNKNOWN if f.generation_tokens_per_s is None else in_rate(f.generation_tokens_per_s),
        in_time(f.first_token.p50_s),
        in_time(f.first_token.p99_s),
        str(f.num_failed),
    ]


def bar(fraction: float, width: int = BAR_WIDTH) -> Text:
    """How full something is, 0 to 1; anything above nothing shows."""
    cells = min(width, max(round(fraction * width), 1 if fraction > 0 else 0))
    colour = "red" if fraction > 0.9 else "yellow" if fraction > 0.7 else "green"
    return Text().append(FULL * cells, colour).append(EMPTY * (width - cells), "dim")


def sparkline(values: Iterable[float], width: int = SPARK_WIDTH) -> str:
    """The last ``width`` values, the greatest of them as high as can be; what is above 0 shows."""
    shown = tuple(values)[-width:]
    top = max(shown, default=0.0)
    highest = len(LEVELS) - 1
    return "".join(LEVELS[max(1, round(value / top * highest)) if value > 0 else 0] for value in shown)


def in_rate(per_s: float) -> str:
    """Tokens per second for people: 9.5, 123, 12.3K."""
    return f"{per_s:.1f}" if 0 < per_s < 10 else terminal.in_short(round(per_s))


def in_time(seconds: float | None) -> str:
    """A latency for people: 850 µs, 12 ms, 1.25 s."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
