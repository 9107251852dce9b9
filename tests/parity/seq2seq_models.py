"""Tiny encoder-decoder models of seeded noise, the same under any release of transformers: weights are drawn by the
names of the parameters, tokenizers are spelled out. Runs in the environment of the old release too, which has no
Slipstream.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

LANGUAGES = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN", "it_IT", "ja_XX", "kk_KZ",
    "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO", "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN",
)  # fmt: skip
_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_WORDS = (
    "the", "a", "of", "and", "to", "in", "is", "it", "that", "was", "he", "for", "on", "are", "with", "as", "his",
    "they", "be", "at", "one", "have", "this", "from", "or", "had", "by", "hot", "word", "but", "summar", "ize",
    "trans", "late", "English", "German", "French", "house", "sea", "ship", "sail", "storm", "light",
)  # fmt: skip
_VOCAB_SIZE = 160

_SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256, "vocab_size": _VOCAB_SIZE,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_T5_TASKS = {
    "summarization": {
        "prefix": "summarize: ", "num_beams": 2, "max_length": 30, "min_length": 5, "early_stopping": True,
        "length_penalty": 2.0, "no_repeat_ngram_size": 3,
    },
    "translation_en_to_de": {"prefix": "translate English to German: ", "num_beams": 3, "early_stopping": True},
    "translation_en_to_fr": {"prefix": "translate English to French: ", "num_beams": 4, "max_length": 20},
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "t5": {
        "class": "T5ForConditionalGeneration",
        "config": {
            "vocab_size": _VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "task_specific_params": _T5_TASKS,
        },
        "generation": {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 1},
    },
    "bart": {
        "class": "BartForConditionalGeneration",
        "config": {**_SIZES, "decoder_start_token_id": 2, "scale_embedding": False},
        "generation": {
            "decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
            "forced_bos_token_id": 0, "forced_eos_token_id": 2, "max_length": 24, "min_length": 6,
            "num_beams": 3, "no_repeat_ngram_size": 3,
        },
    },
    "mbart": {
        "class": "MBartForConditionalGeneration",
        "config": {**_SIZES, "decoder_start_token_id": 2},
        "generation": {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "forced_eos_token_id": 2},
    },
    "marian": {
        "class": "MarianMTModel",
        "config": {**_SIZES, "decoder_start_token_id": 1},
        "generation": {
            "decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 1, "bad_words_ids": [[1]],
            "forced_eos_token_id": 2, "max_length": 28, "num_beams": 6,
        },
    },
}  # fmt: skip


def write_model(folder: Path, kind: str) -> Path:
    """A model folder of one of MODELS."""
    import transformers

    plan = MODELS[kind]
    model_class = getattr(transformers, plan["class"])
    model = model_class(model_class.config_class(**plan["config"])).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "norm" not in name:
                dice = np.random.default_rng(zlib.crc32(name.encode()))
                values.copy_(torch.from_numpy(dice.normal(0.0, 0.35, tuple(values.shape)).astype(np.float32)))
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if "task_specific_params" in plan["config"]:  # later releases do not write it
        config["task_specific_params"] = plan["config"]["task_specific_params"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(plan["generation"]))
    _write_tokenizer(folder, kind)
    return folder


def _write_tokenizer(folder: Path, kind: str) -> None:
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*_SPECIALS, "▁", *letters, *(f"▁{word}" for word in _WORDS)]
    vocab = [(piece, -20.0 if len(piece) == 1 else -2.0) for piece in dict.fromkeys(pieces)][: _VOCAB_SIZE - 30]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    values: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    template = "$A </s>" if kind in ("t5", "marian") else "<s> $A </s>"
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if kind == "mbart":
        tokenizer.add_special_tokens([AddedToken(code, special=True, normalized=False) for code in LANGUAGES])
        values |= {"tokenizer_class": "MBartTokenizer", "src_lang": "en_XX", "additional_special_tokens": LANGUAGES}
        template = "$A </s> en_XX"
    marks = [part for part in template.split() if part != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=None, special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in marks]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "model_max_length": 256}))
