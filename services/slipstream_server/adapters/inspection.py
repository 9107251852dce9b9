"""What an adapter is, by its configuration and the header of its weights: whole, consistent, and nothing besides LoRA.

    base_model.model.<module>.lora_A.weight             [rank, in]     lora_embedding_A           [rank, embeddings]
    base_model.model.<module>.lora_B.weight             [out, rank]    lora_embedding_B           [dimensions, rank]
    base_model.model.<module>.lora_magnitude_vector     [out]          .weight may follow; DoRA only
    base_model.model.<module>.bias                      [out]          where ``bias`` is not none
    base_model.model.<module_to_save>.weight, ...                      trained whole: a classification head

Pure functions; any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from slipstream_server.adapters.configuration import MAX_RANK, LoraConfiguration
from slipstream_server.errors import CorruptArtifact, IncompatibleAdapter
from slipstream_server.models.safetensors_header import TensorEntry

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "down_embedding",
    ".lora_embedding_B": "up_embedding",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """One adapted module: an update of ``num_outputs`` x ``num_inputs`` through ``rank``."""

    num_inputs: int
    num_outputs: int
    rank: int
    is_embedding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """A checked adapter. Modules are named by their path in the base, without PEFT's prefix.

    ``saved_whole``: shapes of tensors that replace the base's: heads and biases.
    """

    configuration: LoraConfiguration
    modules: Mapping[str, LoraModule]
    saved_whole: Mapping[str, tuple[int, ...]]
    dtype: str
    num_parameters: int

    @property
    def target_names(self) -> tuple[str, ...]:
        """The adapted modules by the last part of their path, sorted."""
        return tuple(sorted({module.rpartition(".")[2] for module in self.modules}))

    @property
    def largest_rank(self) -> int:
        return max(module.rank for module in self.modules.values())


def inspect(configuration: LoraConfiguration, tensors: Mapping[str, TensorEntry]) -> AdapterFacts:
    """The facts of an adapter; its configuration's targets are narrowed to the modules there are tensors for.

    Raises CorruptArtifact where configuration and tensors contradict each other, IncompatibleAdapter for what is no
    LoRA of linear layers and embeddings.
    """
    parts: dict[str, dict[str, TensorEntry]] = {}
    saved_whole: dict[str, tuple[int, ...]] = {}
    for name, entry in tensors.items():
        _check_tensor(name, entry)
        module, part = _split(name)
        if part is None:
            saved_whole[_saved(module, configuration)] = entry.shape
        elif entry is not parts.setdefault(module, {}).setdefault(part, entry):
            raise CorruptArtifact(f"{FILE}: {module[:120]!a} has the same factor twice")
    if not parts:
        raise CorruptArtifact(f"{FILE}: holds no tensor of a LoRA")
    modules = {name: _module(name, factors, configuration) for name, factors in sorted(parts.items())}
    return AdapterFacts(
        configuration=replace(configuration, target_modules=_targets(configuration, modules)),
        modules=modules,
        saved_whole=dict(sorted(saved_whole.items())),
        dtype=_most_common_dtype(tensors.values()),
        num_parameters=sum(entry.num_elements for entry in tensors.values()),
    )


def _check_tensor(name: str, entry: TensorEntry) -> None:
    if entry.dtype not in _FLOATS:
        raise IncompatibleAdapter(f"{FILE}: {name[:120]!a} is {entry.dtype}; adapters are {', '.join(_FLOATS)}")
    if entry.num_elements == 0:
        raise CorruptArtifact(f"{FILE}: {name[:120]!a} is empty")


def _split(name: str) -> tuple[str, str | None]:
    """The module a tensor belongs to and which factor it is; None for a tensor that is stored whole."""
    if not name.startswith(PREFIX):
        raise CorruptArtifact(f"{FILE}: {name[:120]!a} does not begin with {PREFIX!r}, as PEFT's tensors do")
    path = name.removeprefix(PREFIX)
    for ending, part in _PARTS.items():
        if path.endswith(ending) and len(path) > len(ending):
            return path.removesuffix(ending), part
    if ".lora_" in path:
        raise IncompatibleAdapter(f"{FILE}: {name[:120]!a} belongs to a variant of LoRA that cannot be served")
    return path, None


def _saved(path: str, configuration: LoraConfiguration) -> str:
    """``path`` if a tensor of that name may be stored whole."""
    module, _, leaf = path.rpartition(".")
    if leaf == "bias" and configuration.bias != "none":
        return path
    if any(_names(saved, module) or f".{saved}." in f".{module}." for saved in configuration.modules_to_save):
        return path
    raise IncompatibleAdapter(
        f"{FILE}: {path[:120]!a} would replace a weight of the base, and modules_to_save does not name it"
    )


def _module(name: str, factors: Mapping[str, TensorEntry], configuration: LoraConfiguration) -> LoraModule:
    is_embedding = "down_embedding" in factors
    down = factors.get("down_embedding" if is_embedding else "down")
    up = factors.get("up_embedding" if is_embedding else "up")
    if down is None or up is None or len(factors) > 2 + ("magnitude" in factors):
        raise CorruptArtifact(f"{FILE}: {name[:120]!a} needs exactly the two factors A and B")
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise IncompatibleAdapter(
            f"{FILE}: {name[:120]!a} is no linear layer; only those and embeddings can be adapted"
        )
    rank, num_inputs = down.shape
    num_outputs = up.shape[0]
    if up.shape[1] != rank or rank != _configured_rank(name, configuration):
        raise CorruptArtifact(
            f"{FILE}: {name[:120]!a} has factors of shape {list(down.shape)} and {list(up.shape)}, where the"
            f" configuration says rank {_configured_rank(name, configuration)} (at most {MAX_RANK})"
        )
    magnitude = factors.get("magnitude")
    if (magnitude is not None) != configuration.use_dora:
        raise CorruptArtifact(f"{FILE}: {name[:120]!a}: a magnitude vector and use_dora go together")
    if magnitude is not None and magnitude.num_elements not in (num_outputs, num_inputs):
        raise CorruptArtifact(f"{FILE}: {name[:120]!a} has a magnitude vector of shape {list(magnitude.shape)}")
    return LoraModule(num_inputs=num_inputs, num_outputs=num_outputs, rank=rank, is_embedding=is_embedding)


def _configured_rank(module: str, configuration: LoraConfiguration) -> int:
    """As PEFT looks it up: the first key of rank_pattern that names the module or the end of its path."""
    matches = (rank for key, rank in configuration.rank_pattern.items() if _names(key, module))
    return next(matches, configuration.rank)


def _targets(configuration: LoraConfiguration, modules: Iterable[str]) -> tuple[str, ...]:
    """The targets that have tensors; every module must be one's. Full paths where no list named them."""
    if configuration.target_modules is None:
        return tuple(sorted(modules))
    used: set[str] = set()
    targets = frozenset(configuration.target_modules)
    for module in modules:
        named = {end for end in _endings(module) if end in targets}
        if not named:
            raise CorruptArtifact(f"{FILE}: {module[:120]!a} is adapted, and target_modules does not name it")
        used |= named
    return tuple(sorted(used))


def _endings(module: str) -> Iterable[str]:
    pieces = module.split(".")
    return (".".join(pieces[start:]) for start in range(len(pieces)))


def _names(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _most_common_dtype(entries: Iterable[TensorEntry]) -> str:
    elements = Counter[str]()
    for entry in entries:
        elements[_FLOATS[entry.dtype]] += entry.num_elements
    return elements.most_common(1)[0][0]
