"""What the registry of adapters answers, as dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from slipstream_client.model_results import Progress
from slipstream_client.plain import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A name under which versions are kept. ``latest_version`` is a version's name, or empty."""

    name: str
    display_name: str
    description: str
    base_model: str
    latest_version: str
    version_count: int
    labels: Mapping[str, str]
    owner: str
    create_time: datetime | None
    update_time: datetime | None
    etag: str

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFile:
    """One file of a version: its path below the root, length and hash."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The shape of an adapter."""

    rank: int | None
    alpha: float | None
    dropout: float
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    bias: str
    use_rslora: bool
    use_dora: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """One set of weights; only its state can change.

    ``state``: importing, registered, verified, failed (see ``error``) or retired. ``provenance`` says where the
    weights come from, under the contract's names; ``aliases`` which ones point at it now.
    """

    name: str
    state: str
    state_message: str
    error: Failure | None
    progress: Progress | None
    digest: str
    files: tuple[ArtifactFile, ...]
    size_bytes: int
    lora: LoraConfig | None
    base_model: str
    base_model_revision: str
    task_type: str
    class_labels: tuple[str, ...]
    provenance: Mapping[str, Any] | None
    metrics: Mapping[str, float]
    aliases: tuple[str, ...]
    owner: str
    create_time: datetime | None
    update_time: datetime | None
    etag: str

    @property
    def id(self) -> str:
        """``v3``."""
        return self.name.rpartition("/")[2]

    @property
    def short(self) -> str:
        """``support@v3``, as requests may name it."""
        return short_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasChange:
    """An earlier position of an alias."""

    version: str
    generation: int
    set_time: datetime | None
    set_by: str
    comment: str
    gate_overridden: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterAlias:
    """A name that points at a version. ``generation`` counts its moves; ``history`` is newest first."""

    name: str
    version: str
    generation: int
    history: tuple[AliasChange, ...]
    gate: Mapping[str, Any] | None
    create_time: datetime | None
    update_time: datetime | None
    etag: str

    @property
    def id(self) -> str:
        """``live``."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasMove:
    """An alias that was moved. Where ``unconfirmed_replicas`` is empty, no request that starts from now on is
    answered by the version before; ``alias`` is None where a new one was only validated.
    """

    alias: AdapterAlias | None
    unconfirmed_replicas: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveAdapter:
    """The adapter a model applies where a request names none."""

    model: str
    adapter: str
    enabled: bool
    generation: int
    update_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveChange:
    """A model's active adapter was changed; ``unconfirmed_replicas`` as in AliasMove."""

    active_adapter: ActiveAdapter | None
    unconfirmed_replicas: tuple[str, ...]


def short_name(name: str) -> str:
    """``adapters/support/versions/v3``, or ``.../aliases/live``, as ``support@v3``; other names as they are."""
    parts = name.split("/")
    if len(parts) == 4 and parts[0] == "adapters" and parts[2] in ("versions", "aliases"):
        return f"{parts[1]}@{parts[3]}"
    return name.removeprefix("adapters/")
