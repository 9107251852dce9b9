"""What a model folder holds, and whether it may be opened at all.

A folder is accepted when its weights are whole safetensors files and its configuration asks for no code of its own.
Pickled weights and configurations that want remote code are UnsafeWeights; files that contradict themselves are
CorruptArtifact. The folder's location is never put into a message. Free of torch and transformers; plain functions that
block on the disk; any thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream_server.errors import CorruptArtifact, UnsafeWeights
from slipstream_server.models.safetensors_header import read_header

MAX_CONFIG_BYTES = 8 * 1024 * 1024
MAX_INDEX_BYTES = 64 * 1024 * 1024
MAX_SHARDS = 4096

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "slipstream.json"

# Files in which transformers looks for classes to import.
CODE_FILES = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip

# A tokenizer is there when one of these is; only the first can be read without transformers.
FAST_TOKENIZER = "tokenizer.json"
SLOW_TOKENIZER_FILES = frozenset(
    {
        "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
        "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "target.spm", "bpe.codes", "vocab.bpe",
        "tekken.json",
    }
)  # fmt: skip

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})
_ATTENTION_KEYS = frozenset({"attn_implementation", "_attn_implementation"})
_MAX_NESTING = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderContents:
    """An accepted model folder: its configuration, its weight files (names within the folder), and what it still
    lacks."""

    config: Mapping[str, Any]
    weight_files: tuple[str, ...]
    code_keys: tuple[str, ...]
    lacks: tuple[str, ...]

    @property
    def is_prepared(self) -> bool:
        return not self.code_keys and not self.lacks


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``; raises CorruptArtifact when it is none, or longer than ``max_bytes``."""
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise CorruptArtifact(f"{path.name}: cannot be read ({error.strerror})") from error
    if len(raw) > max_bytes:
        raise CorruptArtifact(f"{path.name}: longer than {max_bytes} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{path.name}: not valid JSON") from error
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{path.name}: no JSON object")
    return value


def read_json_if_present(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def check_model_folder(folder: Path) -> FolderContents:
    """Accept or refuse a model folder; ``code_keys`` and ``lacks`` say what a preparation must remove and add."""
    if not (folder / "config.json").is_file():
        raise CorruptArtifact("config.json: missing, so this is no model folder")
    if (folder / ADAPTER_CONFIG).exists():
        # transformers would load the adapter, and the base it names, behind our back.
        raise CorruptArtifact(
            f"{ADAPTER_CONFIG}: an adapter among a model's files; the two belong in folders of their own"
        )
    config = read_json(folder / "config.json")
    _refuse_foreign_kernels(config)
    return FolderContents(
        config=config,
        weight_files=_weight_files(folder),
        code_keys=tuple(_code_keys(folder)),
        lacks=tuple(_lacks(folder, config)),
    )


def check_adapter_folder(folder: Path) -> Mapping[str, Any]:
    """The adapter_config.json of a PEFT adapter folder whose weights are one whole safetensors file."""
    config = read_json(folder / ADAPTER_CONFIG)
    for key in ("auto_map", "megatron_config"):
        if config.get(key):
            raise UnsafeWeights(f"{ADAPTER_CONFIG}: {key} would import code and is not allowed")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _without_safetensors(folder, ADAPTER_WEIGHTS)
    read_header(folder / ADAPTER_WEIGHTS)
    return config


def refuse_code(contents: FolderContents) -> None:
    """Raise UnsafeWeights where the configuration still asks for code of its own."""
    if contents.code_keys:
        raise UnsafeWeights(f"{contents.code_keys[0]} asks for remote code, which is never run")


def shard_names(index_path: Path) -> tuple[str, ...]:
    """The shard files named by a ``*.safetensors.index.json``: plain file names beside the index, nothing else."""
    weight_map = read_json(index_path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptArtifact(f"{index_path.name}: weight_map is missing or empty")
    names = {name for name in weight_map.values() if isinstance(name, str)}
    if len(names) > MAX_SHARDS or len(names) == 0 or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptArtifact(f"{index_path.name}: weight_map must name 1 to {MAX_SHARDS} files")
    for name in names:
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise CorruptArtifact(f"{index_path.name}: {name[:100]!r} is no safetensors file beside the index")
    return tuple(sorted(names))


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is one path component that stays in its folder."""
    return 0 < len(name) <= 255 and name not in {".", ".."} and not any(bad in name for bad in "/\\\0:")


def fingerprint(folder: Path) -> str:
    """Names the state of a folder, 16 hex digits: small files by content, the rest by size and time of change."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        status = path.stat()
        content = path.read_bytes().hex() if status.st_size <= MAX_CONFIG_BYTES else str(status.st_mtime_ns)
        digest.update(f"{path.name}\0{status.st_size}\0{content}\0".encode())
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> tuple[str, ...]:
    if (folder / WEIGHTS).is_file():
        names: tuple[str, ...] = (WEIGHTS,)
    elif (folder / WEIGHTS_INDEX).is_file():
        names = shard_names(folder / WEIGHTS_INDEX)
    else:
        raise _without_safetensors(folder, WEIGHTS)
    for name in names:
        if not (folder / name).is_file():
            raise CorruptArtifact(f"{name}: named by the index and missing")
        read_header(folder / name)
    return names


def _without_safetensors(folder: Path, expected: str) -> UnsafeWeights | CorruptArtifact:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return UnsafeWeights(f"{pickles[0]}: pickled weights are never opened; only safetensors are ({expected})")
    return CorruptArtifact(f"{expected}: missing, and no index of shards either")


def _code_keys(folder: Path) -> Iterator[str]:
    for name in CODE_FILES:
        for key in _find_keys(read_json_if_present(folder / name), _CODE_KEYS, _MAX_NESTING):
            yield f"{name}: {key}"


def _find_keys(value: Any, wanted: frozenset[str], depth: int) -> Iterator[str]:
    if not isinstance(value, dict) or depth == 0:
        return
    for key, inner in value.items():
        if key in wanted and inner:
            yield key
        yield from _find_keys(inner, wanted, depth - 1)


def _refuse_foreign_kernels(config: Mapping[str, Any]) -> None:
    """transformers reads an attention implementation with a slash as a repository of kernels to download and run."""
    for key in _ATTENTION_KEYS & config.keys():
        value = config[key]
        names = value.values() if isinstance(value, dict) else [value]
        if any("/" in str(name) for name in names):
            raise UnsafeWeights(f"config.json: {key} names a repository of code, which is never run")


def _lacks(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    names = {path.name for path in folder.iterdir()}
    if FAST_TOKENIZER not in names and names & SLOW_TOKENIZER_FILES:
        yield FAST_TOKENIZER
    if FAST_TOKENIZER in names and "tokenizer_config.json" not in names:
        yield "tokenizer_config.json"
    if "chat_template.jinja" not in names and read_json_if_present(folder / "tokenizer_config.json").get(
        "chat_template"
    ):
        yield "chat_template.jinja"
    if "generation_config.json" not in names and is_generative(config):
        yield "generation_config.json"


def is_generative(config: Mapping[str, Any]) -> bool:
    """Whether the configuration's architecture has a language-model head to generate with."""
    endings = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    return any(str(name).endswith(endings) for name in config.get("architectures") or ())
