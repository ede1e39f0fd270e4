"""Prompts that wait inside one engine for the tokens of its next steps, by a key: what composers share."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final

from chiron.core.types import Request

Key = tuple[float, ...]
_Entry = tuple[Key, int, Request]
SIZE_MIN: Final = 64
"""Entries that are not looked through for some that are over."""


class PromptQueue:
    """Least key first, then who was added earlier. O(log prompts) a call; entries that are over are dropped when they
    surface, or once they are most of all. Those of which a part is done can be asked for by themselves."""

    def __init__(self) -> None:
        self._fresh: list[_Entry] = []
        self._begun: list[_Entry] = []
        self._current: dict[int, int] = {}
        """The number of the entry that counts, by request."""
        self._added = 0
        self._size_max = SIZE_MIN

    def add(self, request: Request, key: Key, begun: bool) -> None:
        """In place of the entry that it has, if it has one."""
        self._added += 1
        self._current[request.id] = self._added
        heappush(self._begun if begun else self._fresh, (key, self._added, request))
        if len(self._fresh) + len(self._begun) > self._size_max:
            self._fresh, self._begun = self._kept(self._fresh), self._kept(self._begun)
            self._size_max = SIZE_MIN + 2 * len(self._current)

    def _kept(self, heap: list[_Entry]) -> list[_Entry]:
        kept = [entry for entry in heap if self._current.get(entry[2].id) == entry[1]]
        heapify(kept)
        return kept

    def remove(self, request: Request) -> None:
        """It may not be there."""
        self._current.pop(request.id, None)

    def head(self, begun: bool) -> Request | None:
        """``begun``: of those only of which a part is done."""
        first = self._first(self._begun)
        other = None if begun else self._first(self._fresh)
        if first is None or (other is not None and other < first):  # Numbers are different: requests are not compared.
            first = other
        return None if first is None else first[2]

    def _first(self, heap: list[_Entry]) -> _Entry | None:
        current = self._current
        while heap:
            entry = heap[0]
            if current.get(entry[2].id) == entry[1]:
                return entry
            heappop(heap)
        return None
