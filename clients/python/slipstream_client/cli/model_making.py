"""``slipstream models create, export, estimate, recommend``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from slipstream_client.cli import terminal
from slipstream_client.cli.model_flags import LoadFlags
from slipstream_client.cli.model_loading import followed
from slipstream_client.cli.named_values import named_values
from slipstream_client.cli.option_groups import with_groups
from slipstream_client.cli.target import Target
from slipstream_client.cli.uploading import transfer_bar
from slipstream_client.client import SlipstreamClient
from slipstream_client.model_making import ModelExport
from slipstream_client.model_results import MemoryEstimate, Model, ModelRecommendation, Progress

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


@with_groups
def create_model(
    model_id: Annotated[str, typer.Argument(help="Id of the new model.")],
    *,
    config_source: Annotated[
        str, typer.Option("--from", help="Whose configuration: a model, a hub id, a catalogue entry.")
    ] = "",
    config: Annotated[
        Path | None, typer.Option(help="A whole configuration, in a JSON file.", exists=True, dir_okay=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE laid over it: num_hidden_layers=2. Repeat it.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="Whose tokenizer; unset: that of --from.")] = "",
    auto_class: Annotated[str, typer.Option(help="AutoModelForCausalLM and so on; unset: its own.")] = "",
    data_type: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or float64.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of the weights; unset: a random one.", show_default=False)] = None,
    check_only: Annotated[bool, typer.Option("--check-only", help="Say whether it could be made.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it until it is made.")] = True,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Make a freshly initialised model from a configuration."""
    given = named_values(overrides or (), "--set")
    whole = None if config is None else _read_config(config)

    async def work(client: SlipstreamClient) -> Model:
        model = await client.models.create(
            model_id,
            config_source=config_source,
            config=whole,
            config_overrides=given,
            tokenizer_source=tokenizer,
            auto_class=auto_class,
            data_type=data_type,
            seed=seed,
            validate_only=check_only,
        )
        if check_only or not wait:
            return model
        return await followed(client, model.name, as_json=as_json)

    model = target.run(work)
    if as_json:
        terminal.print_json(model)
        return
    what = f"{escape(model.architecture)} of {terminal.in_short(model.parameter_count)} parameters"
    said = (
        f"can be made: {what}" if check_only else "is being made" if model.state == "creating" else f"is made: {what}"
    )
    terminal.out.print(f"[green]✓[/] [bold]{escape(model.id)}[/] {said}")


@with_groups
def export_model(
    name: Annotated[str, typer.Argument(help="Id, or models/ID.")],
    folder: Annotated[Path | None, typer.Argument(help="Where to; unset: a folder of its name here.")] = None,
    *,
    adapter: Annotated[str, typer.Option(help="Merge this adapter into the weights: NAME, NAME@v3.")] = "",
    data_type: Annotated[str, typer.Option("--dtype", help="Cast the weights; unset: as they are stored.")] = "",
    max_shard: Annotated[str, typer.Option(help="Largest weights file: 500M, 4G.")] = "",
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Fetch a model's files, as Transformers reads them, and check their hashes."""
    place = folder or Path(name.rpartition("/")[2])
    shard = _in_bytes(max_shard, "--max-shard") if max_shard else None

    async def work(client: SlipstreamClient) -> ModelExport:
        with transfer_bar() as bar:

            def report(progress: Progress) -> None:
                if as_json:
                    terminal.print_json({"event": "progress", "progress": progress})
                bar(progress)

            return await client.models.export(
                name, place, adapter=adapter, data_type=data_type, max_shard_bytes=shard, on_progress=report
            )

    export = target.run(work)
    if as_json:
        terminal.print_json({"event": "exported", "folder": str(place), "export": export})
        return
    size = terminal.in_bytes(sum(file.size_bytes for file in export.files))
    merged = f" with {escape(export.adapter_version)}" if export.adapter_version else ""
    terminal.out.print(f"[green]✓[/] [bold]{escape(name)}[/]{merged} is in {escape(str(place))} [dim]{size}[/]")


@with_groups
def estimate_model(
    source: Annotated[str, typer.Argument(help="A model, a hub id org/name, or a catalogue entry.")],
    *,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a hub id.")] = "",
    flags: LoadFlags,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Estimate the memory that a model would take, before anything is downloaded."""
    estimate = target.run(lambda client: client.models.estimate(source, revision=revision, **flags.options()))
    if as_json:
        terminal.print_json(estimate)
        return
    terminal.facts(_facts(source, estimate))
    if estimate.alternatives:
        rows = terminal.table("held as", "takes", "", right=("takes",))
        for other in estimate.alternatives:
            rows.add_row(
                _held_as({"data_type": other.data_type, "quantization": other.quantization}),
                terminal.in_bytes(other.total_bytes),
                _mark(other.fits),
            )
        terminal.out.print()
        terminal.plain_table(rows)


@with_groups
def recommend_models(
    task: Annotated[str, typer.Argument(help="Task by id or alias: text-generation, summarization, ner.")],
    *,
    memory: Annotated[str, typer.Option(help="What it may take: 8G; unset: what the service has free.")] = "",
    licences: Annotated[list[str] | None, typer.Option("--licence", help="Only these; repeat it.")] = None,
    languages: Annotated[list[str] | None, typer.Option("--language", help="It must know: de; repeat it.")] = None,
    min_context: Annotated[int, typer.Option(help="Shortest acceptable context in tokens.")] = 0,
    local_only: Annotated[bool, typer.Option("--local-only", help="Only what is on the machine already.")] = False,
    max_results: Annotated[int, typer.Option("--max", "-n", help="At most so many.")] = 5,
    as_json: terminal.JsonFlag = False,
    target: Target,
) -> None:
    """Recommend models of the catalogue for a task and a machine, with the reasons."""
    memory_bytes = _in_bytes(memory, "--memory") if memory else 0
    found = target.run(
        lambda client: client.models.recommend(
            task,
            memory_bytes=memory_bytes,
            licences=licences or (),
            languages=languages or (),
            min_context_tokens=min_context,
            local_only=local_only,
            max_results=max_results,
        )
    )
    if as_json:
        for one in found:
            terminal.print_json(one)
    elif not found:
        terminal.note("nothing in the catalogue fits; allow more memory, or fewer conditions")
    for place, one in enumerate([] if as_json else found, start=1):
        _print_recommendation(place, one)


def _print_recommendation(place: int, found: ModelRecommendation) -> None:
    entry = found.entry
    if entry is None:
        return
    quantization = (found.options or {}).get("quantization", "none")
    held = "" if quantization == "none" else str(quantization)
    size = f"{terminal.in_short(entry.parameter_count)}, {terminal.in_bytes(found.total_bytes)}"
    terminal.out.print(f"{place}. [bold]{escape(entry.id)}[/] [dim]{size} {escape(held)}[/]")
    terminal.out.print(f"   {escape(entry.description)}")
    for reason in found.reasons:
        terminal.out.print(f"   [dim]· {escape(reason)}[/]")


def _facts(source: str, estimate: MemoryEstimate) -> list[tuple[str, str]]:
    held = estimate.options or {}
    kv = (
        f"{terminal.in_bytes(estimate.kv_cache_bytes)} ({terminal.in_bytes(estimate.kv_cache_bytes_per_token)} a token)"
    )
    free = f"{terminal.in_bytes(estimate.available_bytes)} {_mark(estimate.fits)}"
    return [
        ("model", f"[bold]{escape(source)}[/]"),
        ("parameters", terminal.in_short(estimate.parameter_count)),
        ("held as", f"{_held_as(held)} on {escape(estimate.device)}"),
        ("weights", terminal.in_bytes(estimate.weights_bytes)),
        ("KV cache", kv if estimate.kv_cache_bytes_per_token else ""),
        ("adapters", terminal.in_bytes(estimate.adapter_bytes) if estimate.adapter_bytes else ""),
        ("overhead", terminal.in_bytes(estimate.overhead_bytes)),
        ("total", f"[bold]{terminal.in_bytes(estimate.total_bytes)}[/]"),
        ("free", free if estimate.available_bytes else ""),
        ("to fetch", terminal.in_bytes(estimate.download_bytes) if estimate.download_bytes else ""),
    ]


def _held_as(options: Mapping[str, Any]) -> str:
    words = (options.get("data_type", ""), options.get("quantization", ""))
    return " ".join(str(word) for word in words if word not in ("", "none"))


def _mark(fits: bool) -> str:
    return "[green]fits[/]" if fits else "[red]does not fit[/]"


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{str(path)!r} is no JSON file", param_hint="--config") from error
    if not isinstance(config, dict):
        raise typer.BadParameter(f"{str(path)!r} holds no JSON object", param_hint="--config")
    return config


def _in_bytes(text: str, hint: str) -> int:
    """``500M``, ``4G``, ``1.5GiB`` or plain bytes."""
    unit = text.upper().removesuffix("IB").removesuffix("B")
    number, factor = (unit[:-1], _UNITS[unit[-1]]) if unit[-1:] in _UNITS and unit[-1:] else (unit, 1)
    try:
        size = float(number) * factor
    except ValueError:
        size = -1.0
    if not 0 <= size < 2**63:
        raise typer.BadParameter(f"{text!r} is no size such as 500M or 4G", param_hint=hint)
    return int(size)
