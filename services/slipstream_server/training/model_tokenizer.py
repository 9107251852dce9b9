"""A model's tokenizer and chat template as examples want them, without torch: what the runner's own tokenizer does too.

Loading and every method block; run them in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from slipstream_server.models.chat_template import ChatTemplate
from slipstream_server.models.facts import ModelFacts
from slipstream_server.models.tokenizer import TextTokenizer


class ModelTokenizer:
    """A ``PreviewTokenizer`` of one prepared model folder."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None, facts: ModelFacts) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._facts = facts

    @classmethod
    def load(cls, folder: Path, facts: ModelFacts) -> ModelTokenizer:
        """Raises ModelLoadFailed where there is no tokenizer, or a template that does not compile."""
        return cls(TextTokenizer.load(folder), ChatTemplate.load(folder), facts)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @cached_property
    def eos_token_id(self) -> int | None:
        name = self._tokenizer.special_tokens.get("eos_token")
        found: int | None = None if name is None else self._tokenizer.backend.token_to_id(name)
        return found

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        return frozenset(self._facts.eos_token_ids).union(own)

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        assert self._template is not None
        return self._template.render(
            messages,
            special_tokens=self._tokenizer.special_tokens,
            parameters={},
            add_generation_prompt=add_generation_prompt,
        )
