"""Texts to token ids with offsets, on any number of threads at once.

Transformers keeps truncation and padding as state of its shared tokenizer, which races between threads and requests.
Here the backend is never told to truncate or pad: texts are encoded whole, cut as the tokenizers library itself would
cut them, and then given their special tokens. Offsets count code points. Torch-free; side threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import tokenizers

from slipstream_server.errors import InvalidField, ModelLoadFailed, PromptTooLong
from slipstream_server.models.tokenizer import encoding_of

Cut = Literal["none", "first", "second", "longest"]
"""Which of two texts is cut where they are too long together; "first" is also for a text alone."""

_NO_LIMIT = 1_000_000
"""Transformers writes a huge number where a tokenizer has no longest text."""


class TextEncoder:
    """One model's tokenizer. ``max_tokens`` is what model and tokenizer read at most, special tokens included."""

    def __init__(self, tokenizer: Any, context_tokens: int | None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelLoadFailed("this task needs a tokenizer with a tokenizer.json, and the model's has none")
        self.tokenizer = tokenizer
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        # Post-processing trims offsets each time it is done: texts are encoded by a copy that leaves it out.
        self._splitter = tokenizers.Tokenizer.from_str(self._backend.to_str())
        self._splitter.post_processor = tokenizers.processors.Sequence([])
        self._splitter.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        self._direction = getattr(tokenizer, "truncation_side", "right")
        own = tokenizer.model_max_length
        limits = [n for n in (own if own < _NO_LIMIT else None, context_tokens) if n]
        self.max_tokens: int | None = min(limits, default=None)

    def encode(
        self, text: str, pair: str | None = None, *, cut: Cut = "none", field: str, max_tokens: int | None = None
    ) -> tokenizers.Encoding:
        """The tokens of one text, or of two that are read together.

        Raises PromptTooLong, naming ``field``, where they are too long and ``cut`` does not allow to shorten them.
        """
        first = self._split(text)
        second = None if pair is None else self._split(pair)
        return self._shortened(first, second, cut, field, max_tokens or self.max_tokens)

    def encode_words(self, words: Sequence[str], *, cut: Cut, field: str) -> tokenizers.Encoding:
        """The tokens of words; offsets count within each word."""
        first = self._split(list(words))
        return self._shortened(first, None, cut, field, self.max_tokens)

    def windows(
        self,
        text: str | Sequence[str],
        pair: str | None = None,
        *,
        max_tokens: int | None,
        stride: int,
        cut_second: bool = False,
        stride_field: str,
        staying_field: str = "text",
        max_first_tokens: int | None = None,
    ) -> list[tokenizers.Encoding]:
        """The text in windows of ``max_tokens`` that share ``stride`` tokens; of a pair one text goes through the
        windows and the other stands in each. One window where everything fits.

        Raises InvalidField, naming ``stride_field``, where windows would not get on, PromptTooLong, naming
        ``staying_field``, where the text that stays leaves no room.
        """
        first = self._split(text if isinstance(text, str) else list(text))
        second = None if pair is None else self._split(pair)
        if second is not None and max_first_tokens is not None:
            (first if cut_second else second).truncate(max_first_tokens)
        moving, staying = (second, first) if cut_second and second is not None else (first, second)
        num_special = self._backend.num_special_tokens_to_add(second is not None)
        num_staying = len(staying) if staying is not None else 0
        if max_tokens is not None and num_special + num_staying + len(moving) > max_tokens:
            room = max_tokens - num_special - num_staying
            if room < 1:
                raise PromptTooLong.of(
                    staying_field, f"{num_staying} tokens leave no room for the text among the {max_tokens} of a window"
                )
            if stride >= room:
                raise InvalidField.of(stride_field, f"{stride} is not below the {room} tokens of text in a window")
            moving.truncate(room, stride=stride, direction=self._direction)
        whole = self._backend.post_process(first, second)
        return [whole, *whole.overflowing]

    def _split(self, text: str | Sequence[str]) -> tokenizers.Encoding:
        return encoding_of(self._splitter, text, add_special_tokens=False)

    def _shortened(
        self,
        first: tokenizers.Encoding,
        second: tokenizers.Encoding | None,
        cut: Cut,
        field: str,
        max_tokens: int | None,
    ) -> tokenizers.Encoding:
        num_special = self._backend.num_special_tokens_to_add(second is not None)
        num_first, num_second = len(first), len(second) if second is not None else 0
        if max_tokens is not None and num_special + num_first + num_second > max_tokens:
            room = max_tokens - num_special
            if cut == "first":
                kept_first, kept_second = room - num_second, num_second
            elif cut == "second":
                kept_first, kept_second = num_first, room - num_first
            elif cut == "longest":
                kept_first, kept_second = _kept_of_both(num_first, num_second, room)
            else:
                kept_first = kept_second = 0
            if min(kept_first, kept_second) < 0 or kept_first + kept_second < 1:
                total = num_special + num_first + num_second
                raise PromptTooLong.of(field, f"{total} tokens exceed the {max_tokens} that this model reads")
            if kept_first < num_first:
                first.truncate(kept_first, direction=self._direction)
            if second is not None and kept_second < num_second:
                second.truncate(kept_second, direction=self._direction)
        return self._backend.post_process(first, second)


def type_ids_of_windows(windows: Sequence[tokenizers.Encoding]) -> list[list[int]]:
    """The type ids of each window: those that its text has in the first one. The library sets them anew only there."""
    by_sequence = dict(zip(windows[0].sequence_ids, windows[0].type_ids, strict=True))
    return [
        [
            own if sequence is None else by_sequence.get(sequence, own)
            for sequence, own in zip(window.sequence_ids, window.type_ids, strict=True)
        ]
        for window in windows
    ]


def _kept_of_both(num_first: int, num_second: int, room: int) -> tuple[int, int]:
    """How much stays of two texts: the longer one is cut down to the other, then both alike; an odd token goes to the
    longer one.
    """
    short, long = sorted((num_first, num_second))
    long = max(short, room - short) if short <= room else short
    if short + long > room:
        short = room // 2
        long = room - short
    return (long, short) if num_first > num_second else (short, long)
