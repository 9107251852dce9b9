"""A row with its place in KV memory. Torch-free; engine thread.

tokens      |<-- computed: keys and values are in `blocks` -->|<-- to compute -->|
blocks      |  full, named  |  full, named  |  last, not full  |
"""

from __future__ import annotations

from slipstream_server.inference.engine.core import Generation, Row
from slipstream_server.inference.engine.kv_blocks import BLOCK_TOKENS, block_digest, root_digest


class Sequence:
    """One row between its arrival and its end.

    ``num_cached`` counts the prompt tokens that were found in the prefix cache when it first ran.
    ``wants_prompt_logits``: the logits of all prompt positions are to be read, so that none may come from the cache.
    """

    __slots__ = (
        "_digests",
        "_root",
        "arrival_s",
        "blocks",
        "generation",
        "is_running",
        "num_cached",
        "num_computed",
        "num_named",
        "row",
        "wants_prompt_logits",
    )

    def __init__(self, generation: Generation, row: Row, arrival_s: float) -> None:
        self.generation = generation
        self.row = row
        self.arrival_s = arrival_s
        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_named = 0
        self.num_cached: int | None = None
        self.is_running = False
        self.wants_prompt_logits = row.request.prompt_logprobs is not None and row.index == 0
        adapter = row.request.adapter
        self._root = root_digest(None if adapter is None else adapter.digest)
        self._digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        return self.row.num_tokens

    @property
    def num_to_compute(self) -> int:
        """Tokens without keys and values yet; at least 1 while it runs, since the newest one has none."""
        return self.num_tokens - self.num_computed

    def digest(self, index: int) -> bytes:
        """The name of its full block ``index``; the tokens must be there."""
        while len(self._digests) <= index:
            start = len(self._digests) * BLOCK_TOKENS
            before = self._digests[-1] if self._digests else self._root
            self._digests.append(block_digest(before, self.row.tokens[start : start + BLOCK_TOKENS]))
        return self._digests[index]

    def blocks_missing(self, num_tokens: int) -> int:
        """How many more blocks it needs to hold its first ``num_tokens`` tokens."""
        return max(0, blocks_for(num_tokens) - len(self.blocks))


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)
