"""``slipstream datasets``: rows to train on, sent, checked and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slipstream_client.cli import terminal
from slipstream_client.cli.dataset_view import dataset_table, facts_of, print_errors, print_preview
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.cli.uploading import say_uploaded, upload_dataset
from slipstream_client.client import SlipstreamClient
from slipstream_client.datasets import Dataset

app = typer.Typer(no_args_is_help=True, help="Datasets: upload, check, preview.")

NameArgument = Annotated[str, typer.Argument(help="Id, or datasets/ID.")]
FORMATS = "messages, prompt_completion, text, text_label, token_labels, question_answering or preference"


@app.command("list")
@with_groups
def list_datasets(
    *,
    state: Annotated[list[str] | None, typer.Option(help="Only datasets in this state; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="The newest so many.", min=1)] = None,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """List the datasets, newest first."""
    datasets = target.run(lambda client: client.datasets.list(states=state or (), limit=limit))
    if as_json:
        for dataset in datasets:
            terminal.print_json(dataset)
    elif datasets:
        terminal.plain_table(dataset_table(datasets))
    else:
        terminal.note("there are no datasets; `slipstream datasets upload FILE` makes one")


@app.command("get")
@with_groups
def get_dataset(name: NameArgument, *, as_json: terminal.JsonFlag = False, target: Target) -> None:
    """Show one dataset, and what is wrong with its rows."""
    dataset = target.run(lambda client: client.datasets.get(name))
    if as_json:
        terminal.print_json(dataset)
        return
    terminal.facts(facts_of(dataset))
    if dataset.row_errors:
        terminal.out.print()
        print_errors(dataset)


@app.command("upload")
@with_groups
def upload(
    file: Annotated[Path, typer.Argument(help="Rows to train on: .jsonl, .json, .csv, .tsv, .parquet or .txt.")],
    *,
    name: Annotated[str, typer.Option("--name", help="Id of the new dataset; unset: the service chooses.")] = "",
    validation: Annotated[Path | None, typer.Option(help="Rows to evaluate on.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows for a test at the end.")] = None,
    format_: Annotated[str, typer.Option("--format", help=f"{FORMATS}; unset: recognised.")] = "",
    map_: Annotated[
        list[str] | None, typer.Option("--map", help="FIELD=NAME_IN_THE_FILE, as prompt=question; may be repeated.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title for people.")] = "",
    check_only: Annotated[bool, typer.Option("--check-only", help="Check everything, store nothing.")] = False,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Upload rows to train on, and check each of them. Exit code 1 unless all can be trained on."""
    files = {"train": file, "validation": validation, "test": test}
    given = {split: path for split, path in files.items() if path is not None}

    async def work(client: SlipstreamClient) -> Dataset:
        return await upload_dataset(
            client,
            given,
            dataset_id=name,
            format=format_,
            field_mapping=_mapping(map_ or []),
            display_name=title,
            validate_only=check_only,
        )

    dataset = target.run(work)
    if as_json:
        terminal.print_json(dataset)
    else:
        say_uploaded(dataset)
    if dataset.state in ("invalid", "failed"):
        raise typer.Exit(1)


def _mapping(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        field, equals, source = pair.partition("=")
        if not equals or not field or not source:
            raise typer.BadParameter(f"{pair!r} is not FIELD=NAME_IN_THE_FILE", param_hint="--map")
        found[field] = source
    return found


@app.command("preview")
@with_groups
def preview(
    name: NameArgument,
    *,
    base: Annotated[str, typer.Option("--base", help="Model whose tokenizer and template are used.")] = "",
    split: Annotated[str, typer.Option(help="Split; unset: the first one.")] = "",
    start_row: Annotated[int, typer.Option("--start", help="First row, from 0.", min=0)] = 0,
    row_count: Annotated[int, typer.Option("--rows", "-n", help="Rows to show.", min=1, max=100)] = 3,
    max_length: Annotated[int | None, typer.Option(help="Tokens at which rows are cut.", min=1)] = None,
    train_on_prompt: Annotated[bool, typer.Option("--train-on-prompt", help="The prompt is learned too.")] = False,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Show rows as a job would train on them: with --base as tokens, those that are learned in colour."""
    found = target.run(
        lambda client: client.datasets.preview(
            name,
            base_model=base,
            split=split,
            start_row=start_row,
            row_count=row_count,
            max_length_tokens=max_length,
            train_on_prompt=train_on_prompt,
        )
    )
    if as_json:
        for row in found.rows:
            terminal.print_json(row)
    elif found.rows:
        print_preview(found)
    else:
        terminal.note(f"there is no row {start_row}: the split has {found.row_count}")


@app.command("delete")
@with_groups
def delete_dataset(name: NameArgument, *, as_json: terminal.JsonFlag = False, target: Target) -> None:
    """Delete a dataset that no running job uses."""
    target.run(lambda client: client.datasets.delete(name))
    terminal.deleted(name, as_json)
