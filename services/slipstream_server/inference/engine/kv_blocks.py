"""Who owns which block of KV memory, and which blocks hold a prefix that somebody may read again.

Torch-free, exact, engine thread. A block holds the keys and values of ``BLOCK_TOKENS`` successive tokens in every
layer. Every block is in exactly one of these states:

    free      nobody's; its content means nothing
    held      in the tables of one or more sequences (``_holders`` counts them)
    retained  in nobody's table, but full and named by its digest: given again to whoever has the same prefix, and taken
              for other purposes, longest unused first, when no block is free

A full block is named by a digest over the digest of the block before it and its own tokens; the first one's
predecessor is a root that names the adapter. So equal names mean equal prefixes under equal weights, whoever sent
them, and nobody can forge one: the digest is cryptographic.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from slipstream_server.inference.engine.core import TokenArray

BLOCK_TOKENS = 32


def root_digest(adapter_digest: str | None) -> bytes:
    """What stands before the first block of a sequence that runs with this adapter (None: the base)."""
    return hashlib.blake2b((adapter_digest or "").encode(), digest_size=16, person=b"slipstream-root").digest()


def block_digest(before: bytes, tokens: TokenArray) -> bytes:
    """The name of a full block, from that of the block before it."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16, key=before).digest()


class BlockPool:
    """All blocks of one model's KV memory."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; at least 1")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._retained: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that ``take`` could give: free or retained."""
        return len(self._free) + len(self._retained)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def take(self, count: int) -> list[int] | None:
        """Blocks to write into, each held once; None, and nothing taken, where there are not enough."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def find(self, digest: bytes) -> int | None:
        """The block of that name, held or retained."""
        return self._by_digest.get(digest)

    def num_retained(self, blocks: Iterable[int]) -> int:
        """How many of these blocks ``hold`` would turn from retained into held."""
        return sum(block in self._retained for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """One more sequence reads these held or retained blocks."""
        for block in blocks:
            self._retained.pop(block, None)
            self._holders[block] += 1

    def name(self, block: int, digest: bytes) -> None:
        """The held block is full: others with the same prefix may read it. The first block of a name keeps it."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._digests[block] = digest
            self._by_digest[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """One sequence less reads these blocks. Of a sequence's own, the last are given up first later on."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._retained[block] = None

    def forget_prefixes(self) -> None:
        """Nothing that was computed before may be read again by newcomers."""
        for block, digest in enumerate(self._digests):
            if digest is not None:
                self._digests[block] = None
        self._by_digest.clear()
        self._free.extend(self._retained)
        self._retained.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that every block is in exactly one state, and is held as often as it stands in ``tables``."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self._holders, "blocks are held otherwise than the tables say"
        held = {block for block, count in enumerate(self._holders) if count}
        free, retained = set(self._free), set(self._retained)
        assert len(free) == len(self._free), "a block is free twice"
        assert not (held & free) | (held & retained) | (free & retained), "a block is in two states"
        assert len(held) + len(free) + len(retained) == self.num_blocks, "a block is lost"
        named = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert named == self._by_digest, "names and blocks do not agree"
        assert all(self._digests[block] is None for block in free), "a free block has a name"
        assert all(self._digests[block] is not None for block in retained), "a retained block has no name"

    def _evict(self) -> int:
        block, _ = self._retained.popitem(last=False)
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None
        return block
