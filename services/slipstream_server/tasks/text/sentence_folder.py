"""What a sentence-transformers folder says on top of the model: how tokens become one vector, and how much is read.

modules.json lists what the text goes through; only a Transformer, a Pooling of one kind and a Normalize are known here.
Torch-free; reads a prepared folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream_server.errors import CorruptArtifact, UnsupportedField
from slipstream_server.models.folder import is_plain_name, read_json_if_present

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last_token",
}
_MAX_MODULES_BYTES = 1024 * 1024
_NAMES = {"lasttoken": "last_token"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceSettings:
    """``pooling`` "" where the folder says nothing; ``unknown``: what it asks for and is not known here."""

    pooling: str = ""
    normalize: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    unknown: str = ""

    def require_known(self) -> None:
        """Raise UnsupportedField where the folder's own recipe cannot be followed."""
        if self.unknown:
            raise UnsupportedField.of(
                "parameters.pooling", f"must be given: this model's own recipe needs {self.unknown}"
            )


def read_sentence_settings(folder: Path) -> SentenceSettings:
    """The settings of a prepared folder; those of a plain model are empty."""
    limits = read_json_if_present(folder / "sentence_bert_config.json")
    max_tokens = limits.get("max_seq_length")
    settings: dict[str, Any] = {
        "max_tokens": max_tokens if isinstance(max_tokens, int) and max_tokens > 0 else None,
        "lower_case": limits.get("do_lower_case") is True,
    }
    for module in _modules(folder / "modules.json"):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            settings.update(_pooling(folder, str(module.get("path", ""))))
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind != "Transformer":
            settings["unknown"] = f"a module of the kind {kind[:50]}"
    return SentenceSettings(**settings)


def _modules(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open("rb") as file:
        raw = file.read(_MAX_MODULES_BYTES + 1)
    try:
        modules = json.loads(raw) if len(raw) <= _MAX_MODULES_BYTES else None
    except ValueError:
        modules = None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CorruptArtifact(f"{path.name}: no JSON list of objects of at most {_MAX_MODULES_BYTES} bytes")
    return modules


def _pooling(folder: Path, name: str) -> dict[str, str]:
    config = read_json_if_present(folder / name / "config.json") if is_plain_name(name) else {}
    named = config.get("pooling_mode")
    on = [mode for mode, value in config.items() if mode.startswith("pooling_mode_") and value is True]
    kind = _NAMES.get(named, named) if isinstance(named, str) else _MODES.get(on[0]) if len(on) == 1 else None
    if kind is None or kind not in _MODES.values():
        return {"unknown": "a kind of pooling that is not known"}
    return {"pooling": kind}
