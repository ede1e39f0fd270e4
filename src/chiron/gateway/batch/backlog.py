"""Batch work that stays in the store, told to the control plane as sums: it plans for items that it never gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from chiron.gateway.batch.settings import RunnerClock
from chiron.gateway.batch.window import Window
from chiron.store.port import PendingWork


class BacklogPlane(Protocol):
    """What is asked of the control plane."""

    def hold_batch(
        self, model: str, deadline_s: float, cls: str, requests: int, input_tokens: int, input_square: float
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """Work that the control plane was told of, in its own units."""

    deadline_s: float
    items: int
    input_tokens: int
    input_square: float


class Backlog:
    """What the control plane was told of, by batch and model."""

    def __init__(self, *, plane: BacklogPlane, clock: RunnerClock, window_of: Mapping[str, Window]) -> None:
        self._plane = plane
        self._clock = clock
        self._window_of = window_of
        self._held: dict[tuple[str, str], _Held] = {}

    @property
    def items(self) -> int:
        return sum(held.items for held in self._held.values())

    def tell(self, pending: Iterable[PendingWork]) -> None:
        """Tell the control plane what changed in the store."""
        known = [work for work in pending if work.items and work.model in self._window_of]
        now = {(work.batch_id, work.model): self._held_of(work) for work in known}
        for place in [*now, *(place for place in self._held if place not in now)]:
            old, new = self._held.get(place), now.get(place)
            if old != new:
                # On before off: a group that is empty for a moment would be forgotten with what others put there.
                for held, sign in ((new, 1), (old, -1)):
                    if held is not None:
                        self._hold(self._window_of[place[1]], held, sign)
        self._held = now

    def _hold(self, window: Window, held: _Held, sign: int) -> None:
        self._plane.hold_batch(
            window.name,
            held.deadline_s,
            window.cls.name,
            sign * held.items,
            sign * held.input_tokens,
            sign * held.input_square,
        )

    def _held_of(self, work: PendingWork) -> _Held:
        per_token = self._window_of[work.model].model.bytes_per_token
        return _Held(
            deadline_s=self._clock.from_wall_s(work.deadline_s),
            items=work.items,
            input_tokens=round(work.input_bytes / per_token),
            input_square=work.input_bytes_square / (per_token * per_token),
        )
