"""How much device memory a LoRA training needs, from the shapes in the safetensors headers: before anything is loaded.

Weights, gradients and the optimizer's numbers are counted; activations are a rough bound (what PyTorch keeps of one
decoder layer for the backward pass, and float32 logits three times over). Blocks on the disk for milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slipstream_server.errors import InvalidField
from slipstream_server.models.estimate import count_parameters
from slipstream_server.models.facts import ModelFacts
from slipstream_server.models.folder import check_model_folder
from slipstream_server.models.safetensors_header import read_header
from slipstream_server.training.recipe import ALL_LINEAR
from slipstream_server.training.specification import JobSpec

_FLOAT32_BYTES = 4
_ADAM_BYTES = 8
# What Python, torch and its libraries take before the first tensor, measured on a CPU and on CUDA.
_OVERHEAD_BYTES = 700 * 1024**2
_NOT_ADAPTED = ("embed", "wte", "wpe", "lm_head", "norm", "ln_")
# An output layer that is tied to the embeddings is not stored.
_TIED_OUTPUTS = {"lm_head", "embed_out"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on each device at the highest."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int
    num_parameters: int
    num_trainable_parameters: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.overhead


def estimate_training(
    folder: Path, facts: ModelFacts, spec: JobSpec, device: str, longest_tokens: int
) -> TrainingMemory:
    """The memory of ``spec`` on each of its devices, for rows of up to ``longest_tokens``.

    Raises InvalidField for modules that the model has not.
    """
    trainable = _trainable(folder, spec)
    element_bytes = 2 if _is_bfloat16(spec, device) else _FLOAT32_BYTES
    num_parameters = count_parameters(facts)
    return TrainingMemory(
        weights=num_parameters * element_bytes + trainable * _FLOAT32_BYTES,
        gradients=trainable * _FLOAT32_BYTES,
        optimizer=trainable * _ADAM_BYTES,
        activations=_activations(facts, spec, element_bytes, longest_tokens),
        overhead=_OVERHEAD_BYTES,
        num_parameters=num_parameters + trainable,
        num_trainable_parameters=trainable,
    )


def _is_bfloat16(spec: JobSpec, device: str) -> bool:
    precision = spec.hyperparameters.precision
    return precision == "bfloat16" or (precision == "auto" and device != "cpu")


def _activations(facts: ModelFacts, spec: JobSpec, element_bytes: int, longest_tokens: int) -> int:
    tokens = spec.hyperparameters.batch_size_per_device * longest_tokens
    hidden, inner = facts.hidden_size or 0, facts.intermediate_size or 0
    per_layer = (16 * hidden + 6 * inner) * element_bytes
    logits = 3 * (facts.vocab_size or 0) * _FLOAT32_BYTES
    return tokens * ((facts.num_layers or 0) * per_layer + logits)


def _trainable(folder: Path, spec: JobSpec) -> int:
    """Elements of the two factors of every adapted matrix, and of what is trained whole."""
    shapes = dict(_matrices(folder))
    _require_saved(spec.lora.modules_to_save, folder)
    wanted = spec.lora.target_modules or (ALL_LINEAR,)
    if wanted == (ALL_LINEAR,):
        chosen = {path for path in shapes if not any(part in path for part in _NOT_ADAPTED)}
    else:
        chosen = {path for path in shapes if _ends_with_one(path, wanted)}
        _require_all(wanted, shapes)
    factors = sum(spec.lora.rank * sum(shapes[path]) for path in chosen)
    whole = sum(shapes[path][0] * shapes[path][1] for path in shapes if _ends_with_one(path, spec.lora.modules_to_save))
    return factors + whole


def _matrices(folder: Path) -> Iterable[tuple[str, tuple[int, int]]]:
    for name in check_model_folder(folder).weight_files:
        for key, entry in read_header(folder / name).items():
            if len(entry.shape) == 2 and key.endswith(".weight"):
                yield key.removesuffix(".weight"), (entry.shape[0], entry.shape[1])


def _require_all(wanted: Iterable[str], shapes: Iterable[str]) -> None:
    paths = list(shapes)
    for index, name in enumerate(wanted):
        if not any(_ends_with_one(path, [name]) for path in paths):
            known = sorted({path.rpartition(".")[2] for path in paths if "embed" not in path})
            text = f"the model has no module {name!r}; it has {', '.join(known)[:500]}"
            raise InvalidField.of(f"spec.lora.target_modules[{index}]", text)


def _require_saved(wanted: Sequence[str], folder: Path) -> None:
    if not wanted:
        return
    names = check_model_folder(folder).weight_files
    tensors = [key for name in names for key in read_header(folder / name)]
    # Of whatever kind, also what holds other modules.
    paths = {".".join(parts[:end]) for parts in (key.split(".") for key in tensors) for end in range(1, len(parts))}
    for index, name in enumerate(wanted):
        if not any(_ends_with_one(path, [name]) for path in paths | _TIED_OUTPUTS):
            raise InvalidField.of(f"spec.lora.modules_to_save[{index}]", f"the model has no module {name!r}")


def _ends_with_one(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)
