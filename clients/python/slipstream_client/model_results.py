"""What the service says of its models: the results of ``client.models``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from slipstream_client.plain import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a download or a load has come; ``total_count`` None while unknown. ``unit`` says what is counted."""

    stage: str
    completed_count: int
    total_count: int | None
    unit: str

    @property
    def fraction(self) -> float | None:
        return self.completed_count / self.total_count if self.total_count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model known to the service; what is empty or zero is not known yet.

    ``state``: unloaded, downloading, loading, ready, ...
    """

    name: str
    source: str
    revision: str
    state: str
    state_message: str
    error: Failure | None
    progress: Progress | None
    data_type: str
    quantization: str
    batching: str
    devices: tuple[str, ...]
    context_tokens: int
    parameter_count: int
    architecture: str
    tasks: tuple[str, ...]
    has_chat_template: bool
    memory_bytes: int
    disk_bytes: int
    adapter_slot_count: int
    loaded_adapter_versions: tuple[str, ...]
    licence: str
    base_model: str
    pinned: bool
    load_time: datetime | None
    vocabulary_size: int
    attention_implementation: str
    labels: tuple[str, ...]
    load_options: Mapping[str, Any] | None
    training_job: str
    owner: str
    etag: str

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def note(self) -> str:
        """What there is to say of its state: why it failed, or the service's own words; mostly empty."""
        return self.error.message if self.error is not None else self.state_message


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAlternative:
    """The same model held otherwise."""

    data_type: str
    quantization: str
    total_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a model would take, in bytes on its device; ``total_bytes`` is the sum of the four parts."""

    weights_bytes: int
    kv_cache_bytes: int
    kv_cache_bytes_per_token: int
    adapter_bytes: int
    overhead_bytes: int
    total_bytes: int
    available_bytes: int
    fits: bool
    device: str
    options: Mapping[str, Any] | None
    parameter_count: int
    download_bytes: int
    alternatives: tuple[MemoryAlternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model that the service knows without asking a hub."""

    id: str
    source: str
    title: str
    description: str
    licence: str
    gated: bool
    tasks: tuple[str, ...]
    family: str
    parameter_count: int
    context_tokens: int
    download_bytes: int
    languages: tuple[str, ...]
    available_locally: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecommendation:
    """A model to use: how to load it so that it fits, what it then takes, and why it stands where it stands."""

    entry: CatalogueEntry | None
    options: Mapping[str, Any] | None
    total_bytes: int
    reasons: tuple[str, ...]
