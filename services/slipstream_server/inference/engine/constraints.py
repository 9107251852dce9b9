"""Grammars that answers must match: a model's vocabulary as bytes, constraints compiled against it, and guides.

    Grammars   one model's compiler and its cache ──compile──> prototype ──copy──> Guide, one for each row

Compiling and masking release the GIL inside llguidance, whose own limits bound the work of every step. Reading the
vocabulary does not: ``prepare`` does it while nobody is answered yet, else the first compilation does. A guide belongs
to one thread at a time: the mask thread between ``begin`` and ``wait`` of Masks, else the engine's. Torch-free; knows
nothing of schedulers.

What counts as an end is decided here, not by the library: it is given an end token of its own outside the vocabulary,
so that a row's own end tokens are allowed exactly where the grammar may end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipstream_server.errors import InvalidField, InvalidRequest, UnsupportedField
from slipstream_server.inference.constraint_rules import check_constraint, parse_schema
from slipstream_server.inference.detokenizer import DetokenizerFactory
from slipstream_server.inference.engine.cores import go_anywhere
from slipstream_server.inference.generation import Constraint, GenerationRequest
from slipstream_server.models.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

BoolArray = npt.NDArray[np.bool_]

_MAX_CACHED = 64
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LIMITS = {"max_lexer_states": 25_000, "verbose_errors": False}
# Forced tokens would be found by tokenizing all that must follow, however long; a mask alone is bounded.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
# Between two tokens of JSON: a space, or a line break and some indentation, so that no answer is blanks without end.
_JSON_OPTIONS = {"whitespace_pattern": r"[\x20]|\n[\x20]{0,16}", "lenient": False}
_MAX_MESSAGE_CHARS = 200


class _Words:
    """The vocabulary as the library reads it: the bytes of every token, and one end token of its own behind them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: Sequence[int]) -> None:
        self.eos_token_id = len(tokens)
        self.tokens = [*tokens, b""]
        self.special_token_ids = [*special_ids, self.eos_token_id]

    def __call__(self, text: bytes | str) -> list[int]:
        raise NotImplementedError("nothing is tokenized for a grammar")


class Vocabulary:
    """The tokens of one model. ``not_first``: tokens that lose a leading space at the beginning of a text."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        from llguidance import LLTokenizer

        spelled = _Spelling(tokenizer)
        tokens = [spelled.bytes_of(token_id) for token_id in range(tokenizer.vocab_size)]
        unknown = range(len(tokens), vocab_size)
        tokens += [b"" for _ in unknown]
        self.special_ids = tokenizer.special_ids | frozenset(unknown)
        words: Any = _Words(tokens, sorted(self.special_ids))
        self.words = LLTokenizer(words)
        self.num_words = -(-(len(tokens) + 1) // 32)
        self.not_first = np.array([spelled.loses_space(i, token) for i, token in enumerate(tokens)], dtype=np.bool_)


class _Spelling:
    """Tokens as the bytes that the detokenizer makes of them in the middle of a text."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._factory = DetokenizerFactory(tokenizer)

    def bytes_of(self, token_id: int) -> bytes:
        whole = self._factory.bytes_of(token_id)
        if whole is not None:
            return whole
        byte = _BYTE_TOKEN.fullmatch(self._tokenizer.token(token_id) or "")
        return bytes([int(byte[1], 16)]) if byte else self._factory.spell(token_id).encode()

    def loses_space(self, token_id: int, token: bytes) -> bool:
        if not token.startswith(b" ") or self._factory.bytes_of(token_id) is not None:
            return False
        return not self._tokenizer.decode([token_id], skip_special_tokens=False).startswith(" ")


class Guide:
    """Where one row stands in its grammar."""

    __slots__ = ("_ends", "_eos", "_is_fresh", "_matcher", "_vocabulary", "is_complete", "may_end", "problem", "skips")

    def __init__(self, matcher: Any, vocabulary: Vocabulary, request: GenerationRequest, skips: int = 0) -> None:
        """``skips``: leading tokens that the model's own rules force, which are no part of the answer's text."""
        stopping = request.stopping
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._eos = stopping.eos_token_ids
        # A stop token that is text ends the row wherever the grammar allows that text; a special one is an end.
        self._ends = (*self._eos, *(i for i in stopping.stop_token_ids if i in vocabulary.special_ids))
        self._is_fresh = True
        self.skips = skips
        self.may_end = False
        self.is_complete = False
        self.problem: str | None = None

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end the row where the grammar may end."""
        return self._ends

    @property
    def ends_itself(self) -> bool:
        """Whether nothing may follow and no token could say so."""
        return self.is_complete and not self._ends

    @property
    def num_words(self) -> int:
        return self._vocabulary.num_words

    def advance(self, token_id: int) -> None:
        """The row's next token, unless it ended the row."""
        if self.skips:
            self.skips -= 1
            return
        if token_id in self._ends:
            return
        self._is_fresh = False
        if not self._matcher.consume_token(token_id):
            self.problem = _reason(self._matcher.get_error())
        self.is_complete = self._matcher.is_stopped() and self._matcher.is_accepting()

    def fill(self, words_W: npt.NDArray[np.uint32]) -> None:
        """Write one bit for each token that may follow; ends apart. Mask thread."""
        if self.skips:
            words_W[:] = 0xFFFFFFFF
            return
        self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        self.may_end = self._matcher.is_accepting()
        if not self.may_end and (self._matcher.is_error() or self._matcher.is_stopped()):
            self.problem = self.problem or _reason(self._matcher.get_error())

    def mark(self, banned_V: BoolArray) -> None:
        """Complete an unpacked mask: end tokens, and what may not come first. Mask thread."""
        if self.skips:
            return
        if self._is_fresh:
            not_first = self._vocabulary.not_first[: len(banned_V)]
            banned_V[: len(not_first)] |= not_first
        if self.is_complete:
            banned_V[:] = True
        inside = [token_id for token_id in self._ends if token_id < len(banned_V)]
        banned_V[inside] = not self.may_end


class Grammars:
    """One model's constraints: compiled on call, the latest kept. ``compile`` may be called from several threads."""

    def __init__(self, tokenizer_folder: Path, vocab_size: int) -> None:
        self._folder = tokenizer_folder
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Any] = OrderedDict()

    def prepare(self) -> None:
        """Read the vocabulary now: beside a running engine that would hold every step up, for seconds on busy cores.
        Where it fails, the first constraint is told why.
        """
        try:
            self._read_vocabulary()
        except ImportError:
            return
        except Exception as error:
            logger.warning("constraints cannot be enforced: %s", error)

    def cached(self, constraint: Constraint) -> Any:
        """The prototype or the SlipstreamError of an earlier ``compile``; None where there was none."""
        return self._found.get(content_key(constraint))

    def compile(self, constraint: Constraint) -> Any:
        """A prototype for ``guide``, or the SlipstreamError that refuses the constraint. Blocks."""
        try:
            check_constraint(constraint)
            found: Any = self._compiled(constraint)
        except InvalidRequest as error:
            found = error
        with self._lock:
            self._found[content_key(constraint)] = found
            while len(self._found) > _MAX_CACHED:
                self._found.popitem(last=False)
        return found

    def guide(self, prototype: Any, request: GenerationRequest, skips: int = 0) -> Guide:
        """A guide for a fresh row."""
        assert self._vocabulary is not None
        return Guide(prototype.deep_copy(), self._vocabulary, request, skips)

    def _compiled(self, constraint: Constraint) -> Any:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise UnsupportedField.of("constraint", "the server has no llguidance installed") from None
        vocabulary = self._read_vocabulary()
        limits = LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(vocabulary.words, _grammar(constraint), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask builds what later ones reuse, and finds dead ends
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
            raise _refusal(constraint, matcher.get_error())
        return matcher

    def _read_vocabulary(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(TextTokenizer.load(self._folder), self._vocab_size)
            return self._vocabulary


def content_key(constraint: Constraint) -> str:
    """Equal for constraints of equal content."""
    content = json.dumps([constraint.kind, constraint.text, constraint.choices])
    return hashlib.sha256(content.encode()).hexdigest()


def _grammar(constraint: Constraint) -> str:
    """The constraint in the library's own words."""
    match constraint.kind:
        case "json_schema":
            schema = parse_schema(constraint.text)
            if isinstance(schema, bool):
                schema = {} if schema else {"enum": []}
            return f"start: %json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}{_OPTIONS}"
        case "regex":
            return f"start: /{_without_slashes(constraint.text)}/{_OPTIONS}"
        case "choice":
            return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, constraint.choices))}{_OPTIONS}"
        case "grammar":
            return constraint.text + _OPTIONS


def _without_slashes(pattern: str) -> str:
    """The pattern with escapes of the same meaning for what would end it: slashes and line breaks."""
    escapes = {"/": r"\x2f", "\n": r"\n", "\r": r"\r"}
    return re.sub(r"\\?[/\n\r]|\\.", lambda m: escapes.get(m[0][-1], m[0]), pattern)


def _refusal(constraint: Constraint, error: str) -> InvalidRequest:
    field = f"constraint.{constraint.kind}"
    if "NoExtension" in error or not error:
        return InvalidField.of(field, "no text matches it")
    reason = _reason(error)
    is_missing = re.search(r"[Uu]nimplemented|not supported|[Uu]nknown format", reason)
    return (UnsupportedField if is_missing else InvalidField).of(field, reason)


def _reason(error: str) -> str:
    """The one line of the library's message that is for people."""
    if "NoExtension" in error:
        return "no text that matches can go on from here"
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["cannot be enforced"]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    for before in ("failed to compile JSON schema: ", "(in regex): ", "error: "):
        line = line.rpartition(before)[2]
    return line[:_MAX_MESSAGE_CHARS]


class Masks:
    """The token masks of a batch's guided rows, made on a thread beside the forward pass.

    One thread makes all masks in the order of ``begin``: a batch that failed meanwhile leaves its guides alone before
    the next one's are touched.
    """

    _thread = ThreadPoolExecutor(1, "masks", initializer=go_anywhere)

    def __init__(self, guides: Sequence[Guide]) -> None:
        self._guides = guides
        self._words_GW = np.zeros((len(guides), guides[0].num_words), dtype=np.uint32)
        self._pending: Future[BoolArray] | None = None

    def begin(self) -> None:
        """Start on the masks of the rows as they stand."""
        if self._pending is None:
            self._pending = self._thread.submit(self._fill)

    def wait(self, vocab_size: int) -> BoolArray:
        """Which tokens ``[G, V]`` are banned; problems stand in the guides."""
        self.begin()
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending.result()[:, :vocab_size]

    def _fill(self) -> BoolArray:
        for guide, words_W in zip(self._guides, self._words_GW, strict=True):
            guide.fill(words_W)
        banned_GV = np.unpackbits((~self._words_GW).view(np.uint8), axis=1, bitorder="little").view(np.bool_)
        for guide, banned_V in zip(self._guides, banned_GV, strict=True):
            guide.mark(banned_V)
        return banned_GV
