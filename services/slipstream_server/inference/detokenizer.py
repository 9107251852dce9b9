"""Token ids to text as they come: never half a character, and the parts together are the whole.

Two ways, chosen by what the tokenizer decodes with:
- byte-level (GPT-2 and most since): every token is a string of bytes, so a table and an incremental UTF-8 decoder do,
  in constant time a token.
- all others (metaspace, WordPiece, ...): the new token is decoded behind the last one that made text, and the
  difference is its text. Byte tokens (``<0xE4>``) go through an incremental UTF-8 decoder, so that a character appears
  when its last byte does. Where such bytes turn out broken, the good characters before them stay; the library's own
  decoder would turn the whole run of bytes into U+FFFD.

U+FFFD is given for bytes that can no longer become a character, and at ``finish()`` for those that never did. Event
loop; no I/O.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Protocol

from slipstream_server.models.tokenizer import TextTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    """The text of one sequence, token by token."""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is incomplete."""

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for an incomplete character, else nothing."""


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer, and spells single tokens."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = _ByteTable(tokenizer) if _is_byte_level(tokenizer) else None
        self._spellings: dict[int, str] = {}

    def new(self, *, skip_special_tokens: bool) -> Detokenizer:
        skipped = self._tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        if self._bytes is not None:
            return _ByteLevelDetokenizer(self._bytes, skipped)
        return _ContextDetokenizer(self._tokenizer, skipped)

    def bytes_of(self, token_id: int) -> bytes | None:
        """A token's bytes, where the tokenizer is byte-level."""
        return None if self._bytes is None else self._bytes[token_id]

    def spell(self, token_id: int) -> str:
        """A token's text by itself, as in the middle of a text; remembered for each id of the vocabulary."""
        spelling = self._spellings.get(token_id)
        if spelling is None:
            spelling = self._spellings[token_id] = self._spell(token_id)
        return spelling

    def _spell(self, token_id: int) -> str:
        if self._bytes is not None:
            return self._bytes[token_id].decode(errors="replace")
        token = self._tokenizer.token(token_id) or ""
        if _BYTE_TOKEN.fullmatch(token):
            return token
        once = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]


class _ByteTable(dict[int, bytes]):
    """Token id to the bytes it stands for, filled as ids are met."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id) or ""
        try:
            value = bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:  # an added token, which stands for its own text
            value = token.encode()
        if len(self) <= self._tokenizer.vocab_size:
            self[token_id] = value
        return value


class _ByteLevelDetokenizer:
    def __init__(self, table: _ByteTable, skipped: frozenset[int]) -> None:
        self._table = table
        self._skipped = skipped
        self._decoder = _utf8_decoder(errors="replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decoder.decode(self._table[token_id])

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _ContextDetokenizer:
    def __init__(self, tokenizer: TextTokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._context: list[int] = []
        self._decoder = _utf8_decoder(errors="replace")

    def push(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None:
            first = not self._context
            self._context = [token_id]
            text = self._decoder.decode(bytes([int(byte[1], 16)]))
            # A first token's leading space may be stripped, also where it is spelt as a byte.
            return self._decode(self._context) if first and text else text
        broken = self._decoder.decode(b"", True)
        before = self._decode(self._context)
        after = self._decode([*self._context, token_id])
        # Some decoders strip the first token's leading space: one token of context is what tells first from later.
        self._context = [token_id]
        return broken + after[len(before) :]

    def finish(self) -> str:
        return self._decoder.decode(b"", True)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""


def _is_byte_level(tokenizer: TextTokenizer) -> bool:
    decoder = json.loads(tokenizer.backend.to_str())["decoder"] if _may_be_byte_level(tokenizer) else None
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return [part["type"] for part in decoder["decoders"]] == ["ByteLevel"]
    return bool(decoder["type"] == "ByteLevel")


def _may_be_byte_level(tokenizer: TextTokenizer) -> bool:
    """Without writing out a whole tokenizer: whether its decoder is, or wraps, a byte-level one."""
    return type(tokenizer.backend.decoder).__name__ in {"ByteLevel", "Sequence"}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 characters are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
