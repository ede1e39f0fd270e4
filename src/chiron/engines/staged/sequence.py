"""A sequence as the head sees it: its tokens, which replicas it goes through, and how far its KV has come in each.

What is to be done next follows from ``held``, the positions whose KV each stage's replica has. A step takes the first
positions that some stage lacks through all stages from the first to the last one that lacks them. So prefill, decoding
and repair are one rule: after the loss of a replica ``held`` is 0 for its stage, the tokens so far go through the
stages up to that one again, in chunks like a prompt, and the stages behind keep what they have. Stages write KV by
position, so what was under way when something failed is just done again. A token that was drawn is never drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from chiron.engines.staged.replica import Replica


class SequenceListener(Protocol):
    """Whoever draws the tokens."""

    def token(self, logits: memoryview, ids: memoryview, mass: float) -> int | None:
        """The likeliest next tokens after the last one; returns which it is, or None if the sequence has ended."""

    def preempted(self) -> None:
        """There is no KV for it now: it was taken out of the pipeline, and may be put in again."""

    def failed(self, why: str) -> None:
        """It was taken out of the pipeline for good."""


@dataclass(slots=True, kw_only=True, eq=False)
class Group:
    """Pieces that left the first stage together: a micro-batch."""

    open: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Piece:
    """Some positions of a sequence on their way."""

    sequence: Sequence
    epoch: int
    start: int
    end: int
    last: int
    """The last stage that they go through."""
    want: int
    group: Group
    stage: int = 0
    rows: memoryview = field(default_factory=lambda: memoryview(b""))

    @property
    def stale(self) -> bool:
        """The sequence has begun anew since, or left."""
        return self.epoch != self.sequence.epoch


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    id: int
    tokens: list[int]
    """Prompt, and what was generated."""
    want: int
    """Likeliest tokens that drawing one needs."""
    listener: SequenceListener
    held: list[int] = field(default_factory=list)
    path: list[Replica | None] = field(default_factory=list)
    flying: list[Piece] = field(default_factory=list)
    epoch: int = 0
    refusals: int = 0
    """How often replicas would not go on with it, since its last token."""

    @property
    def placed(self) -> bool:
        return bool(self.path) and None not in self.path

    def start_over(self) -> None:
        """Whatever is under way is void."""
        self.epoch += 1
        for piece in self.flying:
            piece.group.open -= 1
        self.flying.clear()

    def lose(self, stage: int) -> None:
        """What this stage held is gone."""
        self.held[stage] = 0
        self.start_over()

    def next_span(self, tokens_max: int) -> tuple[int, int, int] | None:
        """First position, the one after the last, and the last stage of what can be sent now; None: nothing can be."""
        if not self.placed:
            return None
        start = self.flying[-1].end if self.flying else min(self.held)
        # A chunk follows another one as soon as that has left the first stage.
        if start >= len(self.tokens) or (self.flying and self.flying[-1].stage == 0):
            return None
        ahead = [held for held in self.held if held > start]
        end = min([start + tokens_max, len(self.tokens), *ahead])
        last = max((stage for stage, held in enumerate(self.held) if held < end), default=-1)
        return (start, end, last) if last >= 0 else None
