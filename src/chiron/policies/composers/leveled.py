"""Priority levels inside one engine: prompts wait by level, first come, first served within one, and take places back
from sequences of worse levels. What a level is, a policy says (``Levels``).

Places are taken back at every ``every_steps``-th step only (multi-step scheduling), for the first prompt in order: from
the worst sequences that decode, as many as it takes, and from none if all of those together are not enough. Their KV is
saved in host memory. Of one level nobody gives way to another. Where KV runs out, the worst gives it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import inf
from typing import Protocol

from chiron.core.types import Request
from chiron.policies.composers.prompt_queue import PromptQueue
from chiron.policies.policy import Preempter
from chiron.policies.views import StepView


class Levels(Protocol):
    """Which level a request is on: 0 is served first. One object may serve many engines. One that was called off may
    be asked about until its engine lets go of it."""

    def enters(self, request: Request) -> bool:
        """It is in an engine, maybe not for the first time, and waits there; whether it had a place in one that
        failed: then it stops at the next look at the clock."""

    def starts(self, request: Request, now_s: float) -> None:
        """It has a place."""

    def stops(self, request: Request, now_s: float) -> None:
        """It gave its place back, and waits."""

    def level(self, request: Request, now_s: float, made: int) -> int:
        """As of now; so many tokens of its answer are made."""

    def better_s(self, request: Request) -> float:
        """When its level gets better if it waits on; inf: it does not."""


class _Entry:
    __slots__ = ("began_step", "generated", "level", "placed", "request", "tokens", "turn")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = 0
        """Of its prompt, all of it."""
        self.level = 0
        self.turn = 0
        """Its place among those of its level."""
        self.placed = False
        self.generated = 0
        """Tokens of its answer when it began to decode, at step ``began_step``."""
        self.began_step = -1

    @property
    def rank(self) -> tuple[int, int]:
        return self.level, self.turn

    def made(self, step: int) -> int:
        return self.generated + (step - self.began_step if self.began_step >= 0 else 0)

    def kv_tokens(self) -> int:
        """That it needs to be let in."""
        return self.request.kv_saved_tokens or self.tokens


class LeveledComposer:
    """The composer, and its preempter."""

    swaps = True

    def __init__(self, levels: Levels, *, every_steps: int, preempts: bool = True) -> None:
        self.preempter: Preempter | None = self if preempts else None
        self._levels = levels
        self._every_steps = every_steps
        self._queue = PromptQueue()
        self._entries: dict[int, _Entry] = {}
        self._decoding: dict[int, _Entry] = {}
        self._stopped: list[_Entry] = []
        """Those that gave their place back: since when is known at the next look at the clock."""
        self._better: list[tuple[float, int, _Entry]] = []
        """When levels of those that wait get better. Entries that are over are seen to be."""
        self._pushed = 0
        self._turns = 0
        self._now_s = 0.0

    # -- prompts ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        entry = self._entries.get(request.id)
        made = tokens - request.input_tokens
        if entry is None:
            entry = self._entries[request.id] = _Entry(request)
            entry.level = -1
            entry.generated = made
            if self._levels.enters(request):
                self._stopped.append(entry)
            self._relevel(entry, entry.generated)
        if not begun:
            entry.tokens = tokens
            entry.generated, entry.began_step = made, -1
            if entry.placed:
                entry.placed = False
                self._stopped.append(entry)
        self._queue.add(request, entry.rank, begun)

    def forget(self, request: Request) -> None:
        entry = self._entries.pop(request.id, None)
        self._decoding.pop(request.id, None)
        self._queue.remove(request)
        if entry is not None and entry in self._stopped:
            self._stopped.remove(entry)

    def tokens(self, view: StepView) -> int:
        self._look(view.now_s)
        return view.tokens_max

    def head(self, now_s: float, begun: bool) -> Request | None:
        self._look(now_s)
        return self._queue.head(begun)

    def remove_head(self, request: Request) -> None:
        self._queue.remove(request)
        entry = self._entries[request.id]
        if not entry.placed:
            entry.placed = True
            self._levels.starts(request, self._now_s)

    def planned(self, tokens: int, step_s: float) -> None:
        """Nothing is learned from it."""

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        self._look(now_s)
        entry = self._entries[request.id]
        entry.generated, entry.began_step = generated, step
        self._decoding[request.id] = entry

    def left(self, request: Request) -> None:
        del self._decoding[request.id]

    # -- places taken back -----------------------------------------------------------------------------------------

    def steps_left(self, step: int) -> int:
        return self._every_steps - step % self._every_steps

    def gives_way(self, view: StepView) -> Sequence[Request]:
        if view.step % self._every_steps:
            return ()  # Without a look at the clock, as fast forward skips such steps: levels change at the same ones.
        self._look(view.now_s)
        first = self._queue.head(False)
        if first is None or (head := self._entries[first.id]).placed:
            return ()  # Nobody waits, or the next one has its place already.
        need, places, free = head.kv_tokens(), view.places_free, view.kv_free_tokens - view.decoding
        if places > 0 and free >= need:
            return ()
        for entry in self._decoding.values():
            self._relevel(entry, entry.made(view.step))
        worse = [entry for entry in self._decoding.values() if entry.level > head.level]
        leaving: list[Request] = []
        for entry in sorted(worse, key=lambda entry: entry.rank, reverse=True):
            if places > 0 and free >= need:
                break
            if entry.began_step < view.step:  # It has made a token since it was let in.
                leaving.append(entry.request)
                places += 1
                free += entry.request.input_tokens + entry.made(view.step) + 1
        return leaving if places > 0 and free >= need else ()

    def victim(self) -> Request | None:
        worst = max(self._decoding.values(), key=lambda entry: entry.rank, default=None)
        return None if worst is None else worst.request

    # -- levels ----------------------------------------------------------------------------------------------------

    def _look(self, now_s: float) -> None:
        """It is this time: who gave a place back has waited since now, and levels that get better by now do."""
        self._now_s = now_s
        for entry in self._stopped:
            self._levels.stops(entry.request, now_s)
            self._requeue(entry)
        self._stopped.clear()
        due: list[_Entry] = []
        while self._better and self._better[0][0] <= now_s:
            due.append(heappop(self._better)[2])
        for entry in due:
            if self._entries.get(entry.request.id) is entry and not entry.placed:
                self._requeue(entry)

    def _requeue(self, entry: _Entry) -> None:
        self._relevel(entry, entry.generated)
        self._queue.add(entry.request, entry.rank, False)

    def _relevel(self, entry: _Entry, made: int) -> None:
        """Whoever comes to another level is the last one there."""
        level = self._levels.level(entry.request, self._now_s, made)
        if level != entry.level:
            self._turns += 1
            entry.level, entry.turn = level, self._turns
        better_s = inf if entry.placed else self._levels.better_s(entry.request)
        if better_s < inf:
            self._pushed += 1
            heappush(self._better, (better_s, self._pushed, entry))
