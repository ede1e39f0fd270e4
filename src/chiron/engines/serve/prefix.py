"""What a prefix cache holds: the tokens whose KV a new prompt would find.

The engine keeps the KV itself and does not say what it found, so this mirrors it: blocks of tokens by a digest of
everything up to their end, the longest unused forgotten first. An estimate, used for accounting and pacing only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence


class PrefixCache:
    """Full blocks, most recently used last."""

    __slots__ = ("_block_tokens", "_blocks", "_blocks_max")

    def __init__(self, *, block_tokens: int, blocks_max: int) -> None:
        self._block_tokens = block_tokens
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def add(self, token_ids: Sequence[int]) -> None:
        """These tokens are in KV now."""
        # Ends first: a beginning is of use without its end, an end is none without its beginning.
        for digest in reversed(list(self._digests(token_ids))):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > self._blocks_max:
            self._blocks.popitem(last=False)

    def cached(self, prompt: Sequence[int]) -> int:
        """Tokens of the prompt that need no prefill; never the last, whose output is wanted."""
        tokens = 0
        for digest in self._digests(prompt[:-1]):
            if digest not in self._blocks:
                break
            tokens += self._block_tokens
        return tokens

    def _digests(self, token_ids: Sequence[int]) -> Iterator[int]:
        digest, size = 0, self._block_tokens
        for start in range(0, len(token_ids) - size + 1, size):
            digest = hash((digest, *token_ids[start : start + size]))
            yield digest
