"""``slipstream compare``: what the base and its adapters answer to the same, side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from slipstream_client.adapter_results import short_name
from slipstream_client.cli import terminal
from slipstream_client.cli.generate import MAX_PROMPT_CHARACTERS, read_prompt
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.sampling import AnswerFlags
from slipstream_client.cli.target import Target
from slipstream_client.client import SlipstreamClient
from slipstream_client.errors import SlipstreamClientError
from slipstream_client.results import Usage

BASE = "base"
MIN_COLUMN_WIDTH = 28
MAX_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer. ``adapter`` as it was asked for, ``adapter_version`` what answered; ``error`` in place of a text."""

    prompt: str
    adapter: str
    adapter_version: str = ""
    text: str = ""
    finish_reason: str = ""
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    error: str = ""


@with_groups
def compare(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; unset or -: read from stdin.")] = None,
    *,
    adapters: Annotated[str, typer.Option("--adapters", help=f"Comma-separated: {BASE}, NAME, NAME@ALIAS, NAME@v1.")],
    file: Annotated[Path | None, typer.Option(help="File with a prompt a line, in place of PROMPT.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt as it is, without the chat template.")] = False,
    answer: AnswerFlags,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Ask the base and adapters the same, and show the answers side by side.

    Greedy unless sampling is asked for, so that differences come from the weights. Exit code 1 if an answer failed.

    `slipstream compare "My printer is on fire" --adapters base,desk@v1,desk@live`
    """
    options = answer.options()
    if options.pop("adapter", None) is not None:
        raise typer.BadParameter("name them with --adapters", param_hint="--adapter")
    if not {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"} & set(options):
        options["do_sample"] = False
    names = _names(adapters)
    prompts = _prompts(prompt, file)

    async def work(client: SlipstreamClient) -> bool:
        gate = asyncio.Semaphore(MAX_AT_ONCE)

        async def one(text: str, name: str) -> Answer:
            async with gate:
                return await _ask(client, text if raw else _messages(text, system), text, name, options)

        everything = [[asyncio.ensure_future(one(text, name)) for name in names] for text in prompts]
        failed = False
        for text, asked in zip(prompts, everything, strict=True):
            answers = await _all_of(asked, names)
            failed = failed or any(found.error for found in answers)
            _show(text, answers, as_json, several=len(prompts) > 1)
        return failed

    if target.run(work):
        raise typer.Exit(1)


async def _all_of(asked: Sequence[asyncio.Future[Answer]], names: Sequence[str]) -> list[Answer]:
    """The answers in their order; says meanwhile who has not answered yet."""
    with terminal.err.status("") as status:
        waiting = set(asked)
        while waiting:
            left = (name for name, answer in zip(names, asked, strict=True) if answer in waiting)
            status.update(f"[dim]asking {escape(', '.join(left))}[/]")
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    return [answer.result() for answer in asked]


def _names(adapters: str) -> list[str]:
    names = [name.strip() for name in adapters.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("names no adapter", param_hint="--adapters")
    return list(dict.fromkeys(names))


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if file is None:
        return [read_prompt(prompt)]
    if prompt is not None:
        raise typer.BadParameter("give a prompt or a file of prompts, not both", param_hint="--file")
    try:
        with file.open(encoding="utf-8") as source:
            lines = source.read(MAX_PROMPT_CHARACTERS).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise typer.BadParameter(f"{file}: {why}", param_hint="--file") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise typer.BadParameter(f"{file} holds no prompt", param_hint="--file")
    return prompts


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


async def _ask(client: SlipstreamClient, prompt: Any, text: str, name: str, options: dict[str, Any]) -> Answer:
    """One answer; a failure is shown in its place and leaves the others alone."""
    began_s = time.perf_counter()
    try:
        found = await client.generate(prompt, adapter=None if name == BASE else name, **options)
    except SlipstreamClientError as error:
        return Answer(prompt=text, adapter=name, error=str(error), seconds=time.perf_counter() - began_s)
    return Answer(
        prompt=text,
        adapter=name,
        adapter_version=found.adapter_version,
        text=found.text,
        finish_reason=found.finish_reason,
        usage=found.usage,
        seconds=time.perf_counter() - began_s,
    )


def _show(prompt: str, answers: list[Answer], as_json: bool, *, several: bool) -> None:
    if as_json:
        for answer in answers:
            terminal.print_json(answer)
        return
    if several or not terminal.out.is_terminal:
        terminal.out.print(Text(f"› {prompt}", "bold"))
    width = terminal.out.width // len(answers)
    if terminal.out.is_terminal and width >= MIN_COLUMN_WIDTH:
        panels = [_panel(answer, width) for answer in answers]
        terminal.out.print(Columns(panels, padding=0, expand=False))
    else:
        for answer in answers:
            _print_plain(answer)


def _panel(answer: Answer, width: int) -> Panel:
    body = Text(answer.error, "red") if answer.error else Text(answer.text.strip() or "(nothing)")
    return Panel(
        body,
        title=_title(answer),
        title_align="left",
        subtitle=f"[dim]{_cost(answer)}[/]",
        subtitle_align="right",
        border_style="red" if answer.error else "dim" if answer.adapter == BASE else "cyan",
        width=width,
    )


def _title(answer: Answer) -> str:
    """What was asked, and what answered where that says more: an alias is a version, a model's default may not be
    the base.
    """
    version = short_name(answer.adapter_version)
    more = f" [dim]= {escape(version)}[/]" if version and version != answer.adapter else ""
    return f"[bold]{escape(answer.adapter)}[/]{more}"


def _cost(answer: Answer) -> str:
    if answer.error:
        return ""
    cut = " · cut" if answer.finish_reason == "length" else ""
    return f"{answer.usage.completion_tokens} tokens · {answer.seconds:.1f} s{cut}"


def _print_plain(answer: Answer) -> None:
    terminal.out.print(f"── {_title(answer)} [dim]{_cost(answer)}[/]")
    terminal.out.print(Text(f"error: {answer.error}" if answer.error else answer.text.strip()))
