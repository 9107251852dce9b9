"""Whether a stored adapter can be served on a particular model: same base, same shapes, and nothing that a batch shared
with other adapters cannot apply row by row. No torch, no weights; blocks on the disk for milliseconds; any thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from slipstream_server.adapters import configuration, inspection
from slipstream_server.adapters.compatibility import compatible
from slipstream_server.adapters.inspection import AdapterFacts
from slipstream_server.errors import CorruptArtifact, IncompatibleAdapter
from slipstream_server.models.folder import check_model_folder
from slipstream_server.models.safetensors_header import TensorEntry, read_header

_SERVED = "models/"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingBase:
    """A model that adapters are asked for.

    ``known_as``: the sources it is known by (catalogue name, hub id); empty where it is just a folder, of which nobody
    can tell what it holds. ``max_rank``: the largest rank that its worker serves.
    """

    model: str
    folder: Path
    known_as: frozenset[str] = field(default_factory=frozenset)
    max_rank: int = configuration.MAX_RANK

    def tensors(self) -> dict[str, TensorEntry]:
        """Its checkpoint's tensors. Raises CorruptArtifact."""
        names = check_model_folder(self.folder).weight_files
        return {key: entry for name in names for key, entry in read_header(self.folder / name).items()}


def check_fit(folder: Path, trained_on: str, base: ServingBase) -> None:
    """Return if the adapter in ``folder``, whose registry entry says it was ``trained_on`` a base, can be served.

    Raises IncompatibleAdapter, UnsafeWeights, CorruptArtifact.
    """
    _check_base_name(trained_on, base)
    facts = _facts(folder)
    _check_shape_of_serving(facts, base.max_rank)
    compatible(facts, base.tensors())


def _check_base_name(trained_on: str, base: ServingBase) -> None:
    """Names tell more than shapes: two models of one shape are two models. Where one side has no portable name, shapes
    decide alone.
    """
    if trained_on.startswith(_SERVED):
        is_other = trained_on != f"{_SERVED}{base.model}"
    else:
        said = trained_on.partition("@")[0].lower()
        names = {name.lower() for name in (base.model, *base.known_as)}
        is_other = bool(said and base.known_as) and said not in names
    if is_other:
        _refuse(f"it was trained on {trained_on[:120]!a}, and model {base.model!r} is another base")


def _facts(folder: Path) -> AdapterFacts:
    try:
        raw = (folder / configuration.FILE).read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"{configuration.FILE}: cannot be read ({error.strerror})") from error
    return inspection.inspect(configuration.parse(raw), read_header(folder / inspection.FILE))


def _check_shape_of_serving(facts: AdapterFacts, max_rank: int) -> None:
    config = facts.configuration
    if facts.largest_rank > max_rank:
        _refuse(f"its rank {facts.largest_rank} is above {max_rank}, the largest served (inference.max_adapter_rank)")
    if config.use_dora:
        _refuse("it uses DoRA, which cannot share a batch")
    if facts.saved_whole:
        _refuse(f"it replaces {next(iter(facts.saved_whole))[:120]!a} as a whole, which cannot share a batch")
    embeddings = [name for name, module in facts.modules.items() if module.is_embedding]
    if embeddings:
        _refuse(f"it adapts the embedding {embeddings[0][:120]!a}; only linear layers can share a batch")


def _refuse(why: str) -> NoReturn:
    raise IncompatibleAdapter(f"the adapter cannot be served: {why}")
