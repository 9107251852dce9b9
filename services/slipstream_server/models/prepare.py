"""Turns what a source delivered into a prepared folder: ``python -m slipstream_server.models.prepare --help``.

Runs as a process of its own, because it imports torch and transformers and reads files of strangers; its parent
(``preparation``) imports neither. Adds tokenizer.json, chat_template.jinja and generation_config.json where they lack,
removes an auto_map that transformers does not need, and writes GGUF weights out as safetensors. Weights that are
safetensors already are linked, not copied. The last line on stdout is a JSON object: the provenance, or ``{"error":
CLASS, "message": TEXT}``.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers.pre_tokenizers import Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from slipstream_server.errors import SlipstreamError, UnsafeWeights
from slipstream_server.models.folder import (
    CODE_FILES,
    FAST_TOKENIZER,
    PROVENANCE,
    SLOW_TOKENIZER_FILES,
    FolderContents,
    check_model_folder,
    is_generative,
    read_json,
)

# Of these GGUF files the tokenizer splits every digit; the conversion in transformers does not carry that over.
_SINGLE_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
_STORED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_MAX_COPIED_BYTES = 256 * 1024 * 1024
_CODE_KEYS = ("auto_map", "custom_pipelines")


def prepare_folder(source: Path, target: Path, tokenizer: Path | None) -> None:
    """Fill ``target`` with a prepared form of the safetensors folder ``source``."""
    contents = check_model_folder(source)
    _require_native(contents)
    skipped = {*contents.weight_files, *(_tokenizer_names(source) if tokenizer else ())}
    for path in _files_below(source):
        name = path.relative_to(source)
        if str(name) in contents.weight_files:
            (target / name).symlink_to(path.resolve())
        elif str(name) not in skipped and _belongs(path):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target / name)
    _write_tokenizer(tokenizer or source, target)
    if is_generative(contents.config) and not (target / "generation_config.json").exists():
        config = transformers.AutoConfig.from_pretrained(target, local_files_only=True, trust_remote_code=False)
        GenerationConfig.from_model_config(config).save_pretrained(target)


def convert_gguf(source: Path, target: Path, tokenizer: Path | None, dtype: torch.dtype) -> None:
    """Write the GGUF file ``source`` out as a safetensors folder of ``dtype``; quantized weights are dequantized."""
    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(source.parent, **place)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    dequantized = auto_class.from_pretrained(source.parent, dtype=dtype, **place)
    if tokenizer is None:
        fast = AutoTokenizer.from_pretrained(source.parent, **place)
        _settle_as_stored(source, fast)
        fast.save_pretrained(target)
    else:
        _write_tokenizer(tokenizer, target)
        fast = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    plain = _without_quantization(dequantized, auto_class, dtype)
    generation = _generation_config(dequantized.generation_config, fast)
    plain.generation_config = generation
    plain.config.eos_token_id, plain.config.pad_token_id = generation.eos_token_id, generation.pad_token_id
    plain.save_pretrained(target)


def _without_quantization(dequantized: Any, auto_class: Any, dtype: torch.dtype) -> Any:
    """The same weights in a model that does not call itself quantized, which save_pretrained would refuse. Copies no
    tensor.
    """
    values = {
        key: value
        for key, value in dequantized.config.to_dict().items()
        if key not in ("quantization_config", "_model_name_or_path")
    }
    with torch.device("meta"):
        plain = auto_class.from_config(type(dequantized.config).from_dict(values), dtype=dtype)
    plain.load_state_dict(dequantized.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _generation_config(stored: GenerationConfig, tokenizer: Any) -> GenerationConfig:
    """End and padding as the tokenizer has them; padding falls back to the end token."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stored.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stored.pad_token_id
    first_end = end[0] if isinstance(end, list) else end
    return GenerationConfig(
        bos_token_id=stored.bos_token_id, eos_token_id=end, pad_token_id=first_end if pad is None else pad
    )


def _settle_as_stored(source: Path, tokenizer: Any) -> None:
    """What the file says of its tokenizer and the conversion leaves out, always or in some versions."""
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    for token, key in _STORED_TOKENS.items():
        if (field := fields.get(f"tokenizer.ggml.{key}")) is not None:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(int(field.contents())))
    kind = fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() in _SINGLE_DIGIT_SPLITS:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = PreTokenizers([Digits(individual_digits=True), backend.pre_tokenizer])


def _require_native(contents: FolderContents) -> None:
    """An auto_map is dropped where transformers has the same classes built in; otherwise the model would need its
    author's code.
    """
    if not contents.code_keys:
        return
    config = contents.config
    architectures = config.get("architectures") or []
    is_native = config.get("model_type") in CONFIG_MAPPING_NAMES and architectures
    if not is_native or not all(hasattr(transformers, str(name)) for name in architectures):
        what = f"{contents.code_keys[0]} asks for remote code"
        raise UnsafeWeights(f"{what}, and transformers has no {config.get('model_type')!r} of its own")


def _belongs(path: Path) -> bool:
    """Configuration and vocabulary: never weights of another format, never a file too large to be either."""
    is_known = path.name in SLOW_TOKENIZER_FILES or path.suffix in {".json", ".jinja", ".txt"}
    return is_known and path.name != PROVENANCE and path.stat().st_size <= _MAX_COPIED_BYTES


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())


def _copy(path: Path, target: Path) -> None:
    """JSON without the keys that name code; everything else as it is."""
    if path.name in CODE_FILES:
        target.write_text(json.dumps(_without_code(read_json(path)), indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        target.write_bytes(path.read_bytes())


def _without_code(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_code(inner) for key, inner in value.items() if key not in _CODE_KEYS}


def _tokenizer_names(folder: Path) -> set[str]:
    names = {
        FAST_TOKENIZER,
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        *SLOW_TOKENIZER_FILES,
    }
    return names & {path.name for path in folder.iterdir()}


def _write_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as far as the tokenizer in ``source`` has them."""
    if not _tokenizer_names(source):
        return
    for name in _tokenizer_names(source):
        _copy(source / name, target / name)
    settled = read_json(target / "tokenizer_config.json") if (target / "tokenizer_config.json").exists() else None
    if (target / FAST_TOKENIZER).exists() and settled is not None and not settled.get("chat_template"):
        return
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    tokenizer.save_pretrained(target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slipstream_server.models.prepare", description="Prepare a model folder."
    )
    parser.add_argument("--source", type=Path, required=True, help="a safetensors folder, or a .gguf file")
    parser.add_argument("--target", type=Path, required=True, help="an existing folder to fill")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer replaces the source's own")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of weights out of a GGUF file"
    )
    options = parser.parse_args(arguments)
    try:
        if options.source.suffix == ".gguf":
            convert_gguf(options.source.absolute(), options.target, options.tokenizer, getattr(torch, options.dtype))
        else:
            prepare_folder(options.source.absolute(), options.target, options.tokenizer)
    except SlipstreamError as error:
        return _answer({"error": type(error).__name__, "message": error.message}, 1)
    except MemoryError:
        return _answer({"error": "OutOfMemory", "message": "not enough memory to prepare the model"}, 1)
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _answer({"error": "StorageFull", "message": "the disk of the model cache is full"}, 1)
        return _answer(
            {"error": "ModelLoadFailed", "message": f"the model could not be prepared ({type(error).__name__})"}, 1
        )
    return _answer({"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}, 0)


def _answer(answer: Mapping[str, str], status: int) -> int:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
