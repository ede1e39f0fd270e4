"""Batch work that stays in the store, told to the control plane as sums: it plans for items that it never gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from chiron.core.ports import BatchAnnouncements
from chiron.gateway.batch.settings import RunnerClock
from chiron.gateway.batch.window import Window
from chiron.store.port import PendingWork


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """Work that the control plane was told of, in its own units."""

    deadline_s: float
    items: int
    input_tokens: int
    input_square: float


class Backlog:
    """What the control plane was told of, by batch and model."""

    def __init__(
        self, *, announcements: BatchAnnouncements, clock: RunnerClock, window_of: Mapping[str, Window]
    ) -> None:
        self._announcements = announcements
        self._clock = clock
        self._window_of = window_of
        self._told: dict[tuple[str, str], _Told] = {}

    @property
    def items(self) -> int:
        return sum(held.items for held in self._told.values())

    def tell(self, pending: Iterable[PendingWork]) -> None:
        """Tell the control plane what changed in the store."""
        known = [work for work in pending if work.items and work.model in self._window_of]
        now = {(work.batch_id, work.model): self._told_of(work) for work in known}
        for place in [*now, *(place for place in self._told if place not in now)]:
            old, new = self._told.get(place), now.get(place)
            if old != new:
                # On before off: a group that is empty for a moment would be forgotten with what others put there.
                for held, sign in ((new, 1), (old, -1)):
                    if held is not None:
                        self._announce(self._window_of[place[1]], held, sign)
        self._told = now

    def _announce(self, window: Window, held: _Told, sign: int) -> None:
        self._announcements.announce_batch(
            window.name,
            held.deadline_s,
            window.cls.name,
            sign * held.items,
            sign * held.input_tokens,
            sign * held.input_square,
        )

    def _told_of(self, work: PendingWork) -> _Told:
        per_token = self._window_of[work.model].model.bytes_per_token
        return _Told(
            deadline_s=self._clock.from_wall_s(work.deadline_s),
            items=work.items,
            input_tokens=round(work.input_bytes / per_token),
            input_square=work.input_bytes_square / (per_token * per_token),
        )
