"""Accepted batch work in memory, as far as a batch runner asks for it: at once, so that virtual time stands still."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from math import inf

from chiron.store.port import Batch, Ended, Item, NotFound, PendingWork, Swept
from chiron.store.trusted_clock import ClockMarks


class MemoryStore:
    """Earliest deadline first, then in order of the input."""

    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self._waiting: dict[tuple[str, int], Item] = {}
        self._leased: dict[tuple[str, int], Item] = {}
        self.learned: dict[str, bytes] = {}

    def hurry(self, within_s: float) -> None: ...
    def on_news(self, tell: Callable[[], None]) -> None: ...

    def add(self, items: Sequence[Item]) -> None:
        self._waiting.update({(item.batch_id, item.index): item for item in items})

    async def lease(
        self,
        model: str,
        items_max: int,
        before_deadline_s: float | None,
        bytes_max: int,
        besides: Collection[str] = (),
    ) -> list[Item]:
        fits = [i for i in self._waiting.values() if i.model == model and i.batch_id not in besides]
        fits = [i for i in fits if i.deadline_s < (inf if before_deadline_s is None else before_deadline_s)]
        chosen = sorted(fits, key=lambda item: (item.deadline_s, item.batch_id, item.index))[:items_max]
        for item in chosen:
            self._leased[item.batch_id, item.index] = self._waiting.pop((item.batch_id, item.index))
        return chosen

    async def finish(self, ended: Sequence[Ended], now_s: float) -> None:
        for each in ended:
            del self._leased[each.batch_id, each.index]
            self.ended.append(each)

    async def release(self, items: Sequence[tuple[str, int]], failed_attempt: bool) -> None:
        for place in items:
            item = self._leased.pop(place)
            self._waiting[place] = replace(item, attempts=item.attempts + failed_attempt)

    async def pending(self) -> list[PendingWork]:
        groups: dict[tuple[str, str, float], list[int]] = {}
        for item in self._waiting.values():
            groups.setdefault((item.batch_id, item.model, item.deadline_s), []).append(len(item.body))
        return [
            PendingWork(
                batch_id=batch,
                model=model,
                deadline_s=deadline_s,
                items=len(sizes),
                input_bytes=sum(sizes),
                input_bytes_square=sum(size * size for size in sizes),
            )
            for (batch, model, deadline_s), sizes in groups.items()
        ]

    async def get_batch(self, batch_id: str, owner: str | None) -> Batch:
        raise NotFound(batch_id)

    async def unvalidated(self) -> list[Batch]:
        return []

    async def expire(self, now_s: float) -> list[str]:
        return []

    async def sweep(self, now_s: float) -> Swept:
        return Swept(batches=0, files=0)

    async def clock_marks(self) -> ClockMarks:
        return ClockMarks()

    async def keep_clock_marks(self, marks: ClockMarks) -> None: ...

    async def save_learned(self, name: str, data: bytes) -> None:
        self.learned[name] = data

    async def load_learned(self, name: str) -> bytes | None:
        return self.learned.get(name)
