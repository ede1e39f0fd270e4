"""What the parts of the batch runner share: limits, a clock, and waiting after a failure."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from chiron.core.backoff import doubled_s
from chiron.core.clock import Callback, Timer
from chiron.store.port import StoreError

log = logging.getLogger("chiron.batch")


class RunnerClock(Protocol):
    """``net.clock.LiveClock``, or a virtual one."""

    now_s: float

    def post(self, callback: Callback) -> None: ...
    def call_later(self, delay_s: float, callback: Callback) -> Timer: ...
    def wall_s(self, when_s: float) -> float: ...
    def from_wall_s(self, wall_s: float) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """What hardly anybody changes."""

    attempts_max: int = 2
    """Times that an item may fail in the control plane (after its own retries) before it is an error."""
    window_bytes_max: int = 128 << 20
    """Input lines of one model that are queued at a time, or twice as much where some of it is due before the rest:
    lines with images are megabytes each."""
    failing_max: int = 3
    """Failed items in a row, of one model, before the engines are taken to be at fault."""
    finish_max: int = 256
    """Results written at once."""
    finish_wait_s: float = 0.02
    """How long a result waits for others."""
    unwritten_max: int = 4096
    """Results in memory beyond which no new work is taken."""
    poll_s: float = 1.0
    """Between two looks for deadlines and new work."""
    backoff_min_s: float = 0.2
    """Before the next try when the store is full or engines fail; doubled each time."""
    backoff_max_s: float = 30.0
    validations_at_once: int = 2
    validations_max: int = 1000
    """Batches that wait for validation before the API says 429."""
    sweep_period_s: float = 600.0
    """Between two removals of what is past its retention."""
    orphans_period_s: float = 10.0
    """Between two looks for batches that nobody validates any more."""
    clock_gap_s: float = 3600.0
    """The wall clock may have moved on by so much since the last process, without a doubt whether it is right."""
    clock_grace_s: float = 86_400.0
    """For at most so long a clock in doubt must run before anything expires by it."""
    clock_keep_s: float = 60.0
    """Between two times that the clock is written down."""
    answer_max_bytes: int = 64 << 20
    """One item's answer."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


async def back_off(
    clock: RunnerClock, tuning: RunnerSettings, what: str, error: BaseException, delay_s: float
) -> float:
    """Say what went wrong and wait. Returns the next delay."""
    over = asyncio.Event()
    next_s = try_later(clock, tuning, what, error, delay_s, over.set)
    await over.wait()
    return next_s


def try_later(
    clock: RunnerClock, tuning: RunnerSettings, what: str, error: BaseException, delay_s: float, again: Callback
) -> float:
    """Say what went wrong and call ``again`` later. Returns the next delay."""
    known = isinstance(error, StoreError)
    log.warning("%s: %s; next try in %.1f s", what, error, delay_s, exc_info=None if known else error)

    def wake_later() -> None:
        clock.call_later(delay_s, again)

    clock.post(wake_later)
    return doubled_s(delay_s, tuning.backoff_max_s, 1)
