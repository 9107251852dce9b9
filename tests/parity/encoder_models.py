"""Tiny encoders of seeded noise, the same under any release of transformers: weights are drawn by the names of the
parameters, tokenizers are spelled out. Runs in the environment of the old release too, which has no Slipstream.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_SENTENCES = (
    "the a of and to in is it was he for on are with as his they be at one have this from or had by hot but house sea",
    "ship sail storm light harbour captain old who what where when lived near paris london marie curie won prize two",
    "physics chemistry example positive negative sports politics cooking boat river mountain climbed saw never always",
)
WORDS = " ".join(_SENTENCES).split(" ")
PIECES = ("##s", "##ed", "##ing", "##er", "un", "##land", "##ly", "é", "##é", "日", "本", "##y", "##or", "##w", "##ay")
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BPE_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

_ENTITIES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
_NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

MODELS: dict[str, dict[str, Any]] = {
    "bert-classes": {
        "class": "BertForSequenceClassification",
        "config": {"id2label": {0: "bad", 1: "so so", 2: "good"}},
    },
    "bert-multi": {
        "class": "BertForSequenceClassification",
        "config": {"id2label": {0: "red", 1: "blue"}, "problem_type": "multi_label_classification"},
    },
    "bert-regression": {
        "class": "BertForSequenceClassification",
        "config": {"id2label": {0: "stars"}, "problem_type": "regression"},
    },
    "bert-nli": {"class": "BertForSequenceClassification", "config": {"id2label": _NLI}},
    "roberta-nli-reversed": {
        "class": "RobertaForSequenceClassification",
        "config": {"id2label": {0: "ENTAILMENT", 1: "neutral", 2: "contradiction"}},
    },
    "bert-ner": {"class": "BertForTokenClassification", "config": {"id2label": _ENTITIES}},
    "roberta-ner": {"class": "RobertaForTokenClassification", "config": {"id2label": _ENTITIES}},
    "bert-qa": {"class": "BertForQuestionAnswering", "config": {}},
    "roberta-qa": {"class": "RobertaForQuestionAnswering", "config": {}},
    "bert-mask": {"class": "BertForMaskedLM", "config": {}},
    "bert-plain": {"class": "BertModel", "config": {}},
}


def write_model(kind: str, folder: Path) -> Path:
    """Save a model with its tokenizer; returns the folder."""
    import transformers

    is_bert = kind.startswith("bert")
    backend = _wordpiece() if is_bert else byte_level()
    if is_bert:
        names = dict(
            zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT_SPECIALS, strict=True)
        )
    else:
        bos, pad, eos, unk, mask = BPE_SPECIALS
        names = {"bos_token": bos, "cls_token": bos, "eos_token": eos, "sep_token": eos, "pad_token": pad}
        names |= {"unk_token": unk, "mask_token": mask}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if is_bert
        else ["input_ids", "attention_mask"],
        **names,
    )
    spec = MODELS[kind]
    model_class = getattr(transformers, spec["class"])
    config = model_class.config_class(
        vocab_size=backend.get_vocab_size(),
        max_position_embeddings=64 if is_bert else 66,
        pad_token_id=tokenizer.pad_token_id,
        **_SIZES,
        **spec["config"],
    )
    if "id2label" in spec["config"]:
        config.label2id = {name: number for number, name in spec["config"]["id2label"].items()}
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            dice = np.random.default_rng(zlib.crc32(f"{kind} {name}".encode()))
            noise = dice.normal(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.25, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(noise))
    model.save_pretrained(folder, safe_serialization=True) if transformers.__version__ < "5" else model.save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def _wordpiece() -> Tokenizer:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocabulary = [*BERT_SPECIALS, *WORDS, *PIECES, *letters, *(f"##{c}" for c in letters if c.isalnum())]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    backend.add_special_tokens([AddedToken(token, special=True) for token in BERT_SPECIALS])
    return backend


def byte_level() -> Tokenizer:
    """Words of the sentences above are whole tokens where they follow a space; else bytes."""
    vocab = {token: number for number, token in enumerate(BPE_SPECIALS[:4])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        spelled = "Ġ" + word
        for end in range(2, len(spelled) + 1):
            pair = (spelled[: end - 1], spelled[end - 1])
            if "".join(pair) not in vocab:
                vocab["".join(pair)] = len(vocab)
                merges.append(pair)
    vocab["<mask>"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in BPE_SPECIALS])
    return backend
