"""Whether an adapter fits a base model, by the shapes in the safetensors headers of both. No torch, no weights.

For whoever is about to put an adapter on a model: the inference front, the training service, the registry itself where
the base is at hand. Checkpoints and running models may differ in the first parts of a module's path (a head's prefix);
a module is therefore also found by the only path that ends as its own does. Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from slipstream_server.adapters.inspection import AdapterFacts, LoraModule
from slipstream_server.errors import IncompatibleAdapter
from slipstream_server.models.safetensors_header import TensorEntry

_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
# An output layer that is tied to the embeddings is not stored: it has their shape.
_TIED_OUTPUTS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


def compatible(adapter: AdapterFacts, base: Mapping[str, TensorEntry]) -> None:
    """Return if ``adapter`` fits the model whose tensors are ``base``; raises IncompatibleAdapter for the first misfit.

    Weights that are stored quantized are asked for their presence only: their shapes are packed.
    """
    index = _by_ending(base)
    for name, module in adapter.modules.items():
        weight = _find(f"{name}.weight", base, index)
        if weight is None:
            _refuse(f"the base model has no module {name[:120]!r}")
        if weight.dtype in _FLOATS and weight.shape != _weight_shape(module, adapter.configuration.fan_in_fan_out):
            _refuse(
                f"module {name[:120]!r} has a weight of shape {list(weight.shape)} in the base model; the adapter is"
                f" made for {module.num_inputs} inputs and {module.num_outputs} outputs"
            )
    for name, shape in adapter.saved_whole.items():
        stored = _find(name, base, index)
        # A head that the checkpoint lacks is the adapter's own.
        if stored is not None and stored.dtype in _FLOATS and stored.shape != shape and not _is_head(name):
            _refuse(f"{name[:120]!r} has the shape {list(stored.shape)} in the base model and {list(shape)} here")


def _weight_shape(module: LoraModule, is_transposed: bool) -> tuple[int, int]:
    """A linear layer stores [out, in], a transposed one (GPT-2's) [in, out], an embedding [rows, dimensions]."""
    if module.is_embedding or is_transposed:
        return module.num_inputs, module.num_outputs
    return module.num_outputs, module.num_inputs


def _is_head(name: str) -> bool:
    """Heads are made anew for each task: their size is the adapter's to choose."""
    return any(part in ("classifier", "score", "qa_outputs") for part in name.split("."))


def _by_ending(base: Mapping[str, TensorEntry]) -> dict[str, str | None]:
    """Every ending of every tensor's path -> the tensor it belongs to, None where several end so."""
    index: dict[str, str | None] = {}
    for name in base:
        pieces = name.split(".")
        for start in range(len(pieces) - 1):
            ending = ".".join(pieces[start:])
            index[ending] = None if ending in index else name
    return index


def _find(path: str, base: Mapping[str, TensorEntry], index: Mapping[str, str | None]) -> TensorEntry | None:
    if path in base:
        return base[path]
    pieces = path.split(".")
    # Which layer it is must agree ("layers.5"); where there are no layers, module and leaf.
    layer = next((position for position, piece in enumerate(pieces) if piece.isdecimal()), len(pieces) - 1)
    for start in range(max(1, layer)):
        if name := index.get(".".join(pieces[start:])):
            return base[name]
    if pieces[-2] in _TIED_OUTPUTS and pieces[-1] == "weight":
        tied = [name for ending in _EMBEDDINGS if (name := index.get(ending))]
        return base[tied[0]] if tied else None
    return None


def _refuse(why: str) -> NoReturn:
    raise IncompatibleAdapter(f"the adapter does not fit: {why}")
