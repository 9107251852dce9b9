"""``slipstream run``: one task over texts, a file, or a file of many inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slipstream_client.cli import terminal
from slipstream_client.cli.generate import read_prompt
from slipstream_client.cli.named_values import named_values
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.cli.task_inputs import Words, inputs_of, is_lines, lines_of
from slipstream_client.cli.task_model import with_model
from slipstream_client.cli.task_view import TaskView
from slipstream_client.client import SlipstreamClient


@with_groups
def run(
    task: Annotated[str, typer.Argument(help="Task: text-classification, ner, translation_en_to_fr, ...")],
    text: Annotated[list[str] | None, typer.Argument(help="The input; several are run together; -: stdin.")] = None,
    *,
    model: Annotated[str, typer.Option(help="Model; unset: the task's default one, loaded where none is.")] = "",
    adapter: Annotated[str, typer.Option(help="Adapter: NAME, NAME@ALIAS or NAME@vN.")] = "",
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="NAME=VALUE, the value as JSON or text; may be repeated.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A picture, sound or film; or many inputs: .txt or .jsonl, a line each."
        ),
    ] = None,
    question: Annotated[str | None, typer.Option(help="The question, for question answering.")] = None,
    context: Annotated[str | None, typer.Option(help="The text that holds the answer.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="A candidate label; may be repeated.")] = None,
    document: Annotated[
        list[str] | None, typer.Option(help="A document to rank, or a sentence to compare; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for pictures and sounds that come back.")] = None,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Run a task.

    `slipstream run ner "Ada lives in Paris"`, `slipstream run question-answering "Who?" --context "Ada wrote it."`
    """
    view = TaskView(output)
    parameters = named_values(param or (), "--param")
    options: dict[str, Any] = {"adapter": adapter, "parameters": parameters}

    async def stream(client: SlipstreamClient, path: Path, name: str) -> bool:
        failed = False
        async for result in client.tasks.stream(task, lines_of(path), model=name, **options):
            failed |= result.error is not None
            if as_json:
                terminal.print_json(result)
            else:
                terminal.err.rule(f"[dim]{result.index}[/]", align="left")
                view.show(result, None)
        return failed

    async def work(client: SlipstreamClient) -> bool:
        async def with_one(name: str) -> bool:
            return await answered(client, name)

        # An adapter belongs to a model: another one would be of no use to it.
        if model or adapter:
            return await with_one(model)
        return await with_model(client, with_one, quiet=as_json)

    async def answered(client: SlipstreamClient, name: str) -> bool:
        if file is not None and is_lines(file):
            return await stream(client, file, name)
        texts = [read_prompt(part) for part in text or []]
        words = Words(
            texts=texts, question=question, context=context, labels=label or [], documents=document or [], file=file
        )
        kinds = (await client.tasks.describe(task)).input_kinds
        given = inputs_of(words, kinds)
        answer = await client.tasks.run(task, given, model=name, **options)
        for result, item in zip(answer.results, given, strict=True):
            if as_json:
                terminal.print_json(result)
            else:
                view.show(result, item)
        return any(result.error is not None for result in answer.results)

    if target.run(work):
        raise typer.Exit(1)
