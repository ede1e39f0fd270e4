"""What one engine still has of prompts that programs sent it: the KV of the prefix that their next prompts begin with.

As in vLLM and SGLang, it lies in KV that no sequence uses, and gives way to sequences at once: whose program was heard
of longest ago loses its last blocks first. Each prompt of a program begins with the one before it, so a program has one
prefix, which grows, until its conversation is cut: what it began with is gone then. It is held beside the KV of the
sequences that share it, where those engines hold it once: an engine that is full has less of it here.
"""

from __future__ import annotations

from typing import Final

BLOCK_TOKENS: Final = 16
"""vLLM's default. Whole blocks are found again."""
PROGRAMS_MAX: Final = 10_000

Name = tuple[str, str, int]
"""Tenant, program, and how often it has been cut."""


class PrefixCache:
    """Tokens by program, the one heard of longest ago first."""

    __slots__ = ("_held", "tokens")

    def __init__(self) -> None:
        self._held: dict[Name, int] = {}
        self.tokens = 0
        """Of all programs."""

    def found(self, program: Name, prompt_tokens: int) -> int:
        """Tokens of this prompt that need no prefill: whole blocks, and never the last token, which gives the first one
        of the answer."""
        held = self._held.pop(program, 0)
        if held:
            self._held[program] = held
        found = min(held, prompt_tokens - 1)
        return found - found % BLOCK_TOKENS

    def keep(self, program: Name, tokens: int) -> None:
        """So much of its conversation has been computed here."""
        held = self._held.pop(program, 0)
        self._held[program] = max(held, tokens)
        self.tokens += max(0, tokens - held)
        if len(self._held) > PROGRAMS_MAX:
            self.tokens -= self._held.pop(next(iter(self._held)))

    def fit(self, room_tokens: int) -> None:
        """Sequences leave so much room."""
        while self.tokens > max(0, room_tokens):
            oldest = next(iter(self._held))
            held = self._held[oldest]
            kept = max(0, held - (self.tokens - max(0, room_tokens)))
            kept -= kept % BLOCK_TOKENS
            self.tokens -= held - kept
            if kept:
                self._held[oldest] = kept
            else:
                del self._held[oldest]

    def clear(self) -> None:
        self._held.clear()
        self.tokens = 0
