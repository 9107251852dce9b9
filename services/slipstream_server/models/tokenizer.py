"""Text to token ids and back, as transformers' AutoTokenizer would do it, without importing torch.

Reads ``tokenizer.json`` through the ``tokenizers`` library and honours what ``tokenizer_config.json`` says on top of
it: named and added special tokens, splitting of special tokens. Beginning and end tokens are the post-processor's
alone: where there is a tokenizer.json, transformers ignores ``add_bos_token`` and ``add_eos_token`` too. Two things
differ from transformers on purpose: the legacy clean-up of spaces before punctuation is never applied, because a stream
cannot take text back, and nothing is ever truncated or padded.

Methods block for as long as the text is long; call them on threads, which leave the interpreter to others meanwhile.
The object is immutable after loading and may be shared by threads. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from slipstream_server.errors import ModelLoadFailed
from slipstream_server.models.folder import read_json_if_present

# The order in which transformers adds them, where they are missing from tokenizer.json.
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024

# What is shorter takes about as long as handing the interpreter over and back.
_BRIEF_CHARS = 2048
_BRIEF_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpan:
    """A token and the characters it covers, counted in code points; ``start == end`` for special tokens that were
    added.
    """

    token_id: int
    token: str
    start: int
    end: int


class TextTokenizer:
    """One model's tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = _named_special_tokens(config)
        _add_missing_tokens(backend, config, self.special_tokens)
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self.special_ids = frozenset(
            place for place, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.max_token_chars = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """The tokenizer of a prepared model folder; raises ModelLoadFailed where there is none that loads this way."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelLoadFailed("the model has no tokenizer.json, so that text cannot be tokenized")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelLoadFailed(f"tokenizer.json: longer than {MAX_TOKENIZER_BYTES} bytes")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelLoadFailed(f"tokenizer.json: {str(error)[:200]}") from error
        return cls(backend, read_json_if_present(folder / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``. Special tokens written out in it count as special tokens, as in transformers."""
        ids: list[int] = encoding_of(self.backend, text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_spans(self, text: str, *, add_special_tokens: bool = True) -> list[TokenSpan]:
        """The tokens of ``text`` with the characters they cover."""
        encoding = encoding_of(self.backend, text, add_special_tokens=add_special_tokens)
        return [
            TokenSpan(token_id=token_id, token=token, start=start, end=end)
            for token_id, token, (start, end) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        ]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; ids that the tokenizer does not know give nothing."""
        ids = list(token_ids)
        if len(ids) <= _BRIEF_TOKENS:
            text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            [text] = self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        token: str | None = self.backend.id_to_token(token_id)
        return token


def encoding_of(
    backend: tokenizers.Tokenizer, text: str | Sequence[str], *, add_special_tokens: bool
) -> tokenizers.Encoding:
    """The library's account of a text, or of words, while other threads go on however long it takes.

    ``encode`` keeps the interpreter to itself to the end, over a second for a text of 1 MiB; ``encode_batch`` lets go
    of it (tokenizers 0.23).
    """
    is_words = not isinstance(text, str)
    options = {"is_pretokenized": is_words, "add_special_tokens": add_special_tokens}
    if (sum(map(len, text)) if is_words else len(text)) <= _BRIEF_CHARS:
        return backend.encode(text, **options)
    [encoding] = backend.encode_batch([text], **options)
    return encoding


def _content(value: object) -> str | None:
    """The text of a token as tokenizer_config.json writes it: plain, or an object with flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_token(value: object, *, special: bool) -> AddedToken:
    flags = value if isinstance(value, dict) else {}
    chosen = {key: bool(flags[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in flags}
    return AddedToken(_content(value) or "", special=special, **{"normalized": not special, **chosen})


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = ((name, _content(config.get(name))) for name in SPECIAL_TOKEN_NAMES)
    return {name: content for name, content in named if content is not None}


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder")
    by_id = sorted(listed.items(), key=lambda item: int(item[0])) if isinstance(listed, dict) else []
    wanted = [(value, isinstance(value, dict) and bool(value.get("special"))) for _, value in by_id]
    wanted += [(config[name], True) for name in named]
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens"))
    values = list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    wanted += [(value, True) for value in values]
    for value, special in wanted:
        content = _content(value)
        if content is not None and content not in known:
            known.add(content)
            backend.add_tokens([_added_token(value, special=special or content in named.values())])
