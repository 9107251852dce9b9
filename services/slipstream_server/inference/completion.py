"""One sequence of a generation: its tokens become text, its stop strings are looked for, its logprobs get their
spellings.

The tokens of a completion are all those generated up to and including the one that ended it, by whatever reason:
end-of-sequence, stop token, or the token whose text completed a stop string; tokens that the worker had produced beyond
that one are dropped. The text ends before the stop string or stop token, unless ``include_stop``. Event loop; no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream_server.inference.calls import PositionLogprobs, TokenLogprob
from slipstream_server.inference.detokenizer import Detokenizer, DetokenizerFactory
from slipstream_server.inference.generation import FinishReason, TopLogprobs
from slipstream_server.inference.stop_strings import StopAutomaton, StopScanner


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What some tokens added to a sequence; the first ``num_tokens`` of them belong to it."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    matched_stop: str = ""


class SequenceText:
    """The text of one sequence."""

    def __init__(self, detokenizer: Detokenizer, stops: StopAutomaton | None, *, include_stop: bool) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops) if stops is not None else None
        self._include_stop = include_stop
        self.finish_reason: FinishReason | None = None
        self.matched_stop = ""

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> Piece:
        """Add tokens; ``finish_reason`` is that of the last one.

        Nothing may be pushed once the sequence has finished.
        """
        parts: list[str] = []
        for place, token_id in enumerate(token_ids):
            is_last = finish_reason is not None and place == len(token_ids) - 1
            text = "" if is_last and self._omits(finish_reason) else self._detokenizer.push(token_id)
            if is_last:
                text += self._detokenizer.finish()
            matched = self._scan(text, parts)
            if matched is not None:
                return self._finish(parts, place + 1, "stop_string", matched)
        if finish_reason is None:
            return Piece(text="".join(parts), num_tokens=len(token_ids))
        if self._scanner is not None:
            parts.append(self._scanner.finish())
        return self._finish(parts, len(token_ids), finish_reason, "")

    def _omits(self, finish_reason: FinishReason | None) -> bool:
        return finish_reason == "stop_token" and not self._include_stop

    def _scan(self, text: str, parts: list[str]) -> str | None:
        if self._scanner is None:
            parts.append(text)
            return None
        match = self._scanner.push(text)
        parts.append(match.text)
        if match.matched is not None and self._include_stop:
            parts.append(match.matched)
        return match.matched

    def _finish(self, parts: list[str], num_tokens: int, reason: FinishReason, matched: str) -> Piece:
        self.finish_reason, self.matched_stop = reason, matched
        return Piece(text="".join(parts), num_tokens=num_tokens, finish_reason=reason, matched_stop=matched)


def position_logprobs(token_id: int, found: TopLogprobs, detokenizers: DetokenizerFactory) -> PositionLogprobs:
    """A position with spelled tokens. A prompt's first token, which nothing precedes, has logprob 0."""

    def spelled(token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(
            token_id=token_id, token=detokenizers.spell(token_id), logprob=0.0 if math.isnan(logprob) else logprob
        )

    top = zip(found.top_token_ids, found.top_logprobs, strict=True)
    return PositionLogprobs(chosen=spelled(token_id, found.logprob), top=tuple(spelled(*pair) for pair in top))
