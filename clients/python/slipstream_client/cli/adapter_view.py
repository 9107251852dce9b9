"""Adapters, versions and aliases on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from slipstream_client.adapter_results import Adapter, AdapterAlias, AdapterVersion, AliasMove, short_name
from slipstream_client.cli import terminal

COLOURS = {"registered": "green", "verified": "green", "importing": "cyan", "failed": "red", "retired": "dim"}
LIVE = "live"


def adapter_table(adapters: Iterable[Adapter], aliases: Mapping[str, Sequence[AdapterAlias]]) -> Table:
    """One row for each adapter, with where its aliases point."""
    rows = terminal.table("adapter", "aliases", "latest", "versions", "base", "changed", right=("versions",))
    for adapter in adapters:
        rows.add_row(
            f"[bold]{escape(adapter.id)}[/]",
            aliases_in_words(aliases.get(adapter.name, ())),
            adapter.latest_version.rpartition("/")[2],
            str(adapter.version_count),
            escape(adapter.base_model.removeprefix("models/")),
            f"{terminal.age(adapter.update_time)} ago" if adapter.update_time else "",
        )
    return rows


def aliases_in_words(aliases: Iterable[AdapterAlias]) -> str:
    """``live → v3``."""
    return "  ".join(
        f"[{'green' if alias.id == LIVE else 'cyan'}]{escape(alias.id)}[/] → {alias.version.rpartition('/')[2]}"
        for alias in aliases
    )


def version_table(versions: Iterable[AdapterVersion]) -> Table:
    """One row for each version."""
    rows = terminal.table("version", "state", "aliases", "shape", "figures", "from", "size", "age", right=("size",))
    for version in versions:
        rows.add_row(
            f"[bold]{version.id}[/]",
            state_of(version, in_full=False),
            " ".join(f"[{'green' if alias == LIVE else 'cyan'}]{escape(alias)}[/]" for alias in version.aliases),
            f"rank {version.lora.rank}" if version.lora and version.lora.rank else "",
            figures_in_words(version.metrics),
            escape(origin_of(version)),
            terminal.in_bytes(version.size_bytes) if version.size_bytes else "",
            terminal.age(version.create_time),
        )
    return rows


def state_of(version: AdapterVersion, *, in_full: bool = True) -> str:
    """The state in colour; a failure says why, and ``in_full`` so does every other state."""
    more = str(version.error or "") or (version.state_message if in_full else "")
    colour = COLOURS.get(version.state, "dim")
    return f"[{colour}]{version.state or 'unknown'}[/]" + (f" [dim]{escape(more)}[/]" if more else "")


def figures_in_words(metrics: Mapping[str, float]) -> str:
    return escape(" · ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())))


def origin_of(version: AdapterVersion) -> str:
    """Where the weights come from, in a few words."""
    provenance = version.provenance or {}
    if job := provenance.get("training_job"):
        return str(job).removeprefix("trainingJobs/")
    if source := provenance.get("import_source"):
        return str(source)
    if "merge" in provenance:
        return "merge of " + ", ".join(short_name(part.get("adapter", "")) for part in provenance["merge"]["sources"])
    if "initialization_seed" in provenance:
        return "fresh"
    return f"upload {provenance.get('uploaded_by', '')}".strip()


def version_facts(version: AdapterVersion) -> list[tuple[str, str]]:
    """Label and value."""
    provenance = version.provenance or {}
    lora = version.lora
    shape = ""
    if lora is not None:
        alpha = f" · alpha {lora.alpha:g}" if lora.alpha is not None else ""
        shape = f"rank {lora.rank}{alpha} · {', '.join(lora.target_modules)}"
    packages = ", ".join(f"{name} {number}" for name, number in (provenance.get("package_versions") or {}).items())
    return [
        ("version", f"[bold]{escape(version.short)}[/]"),
        ("state", state_of(version)),
        ("aliases", escape(", ".join(version.aliases))),
        ("base", escape(" @ ".join(filter(None, [version.base_model, version.base_model_revision])))),
        ("shape", escape(shape)),
        ("task", escape(version.task_type)),
        ("classes", escape(", ".join(version.class_labels))),
        ("figures", figures_in_words(version.metrics)),
        ("from", escape(origin_of(version))),
        ("dataset", escape(" ".join(filter(None, map(provenance.get, ("dataset", "dataset_digest")))))),
        ("steps", str(provenance.get("step") or "")),
        ("made with", escape(packages)),
        ("digest", version.digest),
        ("files", escape(", ".join(f"{f.path} {terminal.in_bytes(f.size_bytes)}" for f in version.files))),
        ("by", escape(version.owner)),
        ("made", f"{terminal.age(version.create_time)} ago" if version.create_time else ""),
    ]


def adapter_facts(adapter: Adapter, aliases: Sequence[AdapterAlias]) -> list[tuple[str, str]]:
    """Label and value."""
    return [
        ("adapter", f"[bold]{escape(adapter.id)}[/] {escape(adapter.display_name)}"),
        ("", escape(adapter.description)),
        ("base", escape(adapter.base_model)),
        ("aliases", aliases_in_words(aliases)),
        ("labels", escape(", ".join(f"{key}={value}" for key, value in adapter.labels.items()))),
        ("by", escape(adapter.owner)),
    ]


def print_move(move: AliasMove, before: str) -> None:
    """Where an alias points now; who does not know of it yet is a warning."""
    if (alias := move.alias) is None:
        terminal.out.print("[green]✓[/] it could be moved")
        return
    was = f" [dim]was {before}[/]" if before else ""
    version = alias.version.rpartition("/")[2]
    terminal.out.print(
        f"[green]✓[/] [bold]{escape(short_name(alias.name))}[/] → [bold]{version}[/]{was} "
        f"[dim]· generation {alias.generation}[/]"
    )
    if move.unconfirmed_replicas:
        names = ", ".join(move.unconfirmed_replicas)
        terminal.warn(f"not confirmed yet by {names}: these may still answer with the version before")
