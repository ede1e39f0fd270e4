"""``sarathi``: Sarathi-Serve's chunked prefill (OSDI '24) in every engine of a fixed fleet.

A step takes at most ``chunk_tokens`` in all: a token of each sequence that decodes, then prompts, first come, first
served, the last of them in part. Sequences that decode are never held up by a whole prompt.

Source: microsoft/sarathi-serve, sarathi/config/config.py and sarathi/core/scheduler/sarathi_scheduler.py. It schedules
one replica; requests go to the one with the fewest outstanding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from chiron.core.types import Request
from chiron.policies.checks import above, at_least
from chiron.policies.composers.prompt_queue import PromptQueue
from chiron.policies.policy import Estimates, Policy, Preempter
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.views import StepView


@dataclass(frozen=True, slots=True, kw_only=True)
class SarathiSettings:
    chunk_tokens: Annotated[int, Between(128, 2048, log=True)] = 512
    """Of a step in all; Sarathi-Serve's default. No more than the engine's own limit counts."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 128
    """Static max batch size: Sarathi-Serve's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "chunk_tokens", "max_num_seqs")
        at_least(0, self, "instances")


class FirstCome:
    """The composer: prompts in the order in which they came, within a fixed number of tokens."""

    preempter: Preempter | None = None

    def __init__(self, chunk_tokens: float) -> None:
        self._chunk_tokens = chunk_tokens
        self._queue = PromptQueue()
        self._came: dict[int, int] = {}
        """The number in which it came, by request; whoever is preempted keeps it."""
        self._count = 0

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        if request.id not in self._came:
            self._count += 1
            self._came[request.id] = self._count
        self._queue.add(request, (float(self._came[request.id]),), begun)

    def forget(self, request: Request) -> None:
        self._came.pop(request.id, None)
        self._queue.remove(request)

    def tokens(self, view: StepView) -> int:
        return int(min(self._chunk_tokens - view.decoding, view.tokens_max))

    def head(self, now_s: float, begun: bool) -> Request | None:
        return self._queue.head(begun)

    def remove_head(self, request: Request) -> None:
        self._queue.remove(request)

    def planned(self, tokens: int, step_s: float) -> None:
        """Nothing is learned from it."""

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        """Sequences that decode have their token whatever becomes of prompts."""

    def left(self, request: Request) -> None:
        """Likewise."""


def compose(settings: SarathiSettings, estimates: Estimates) -> FirstCome:
    return FirstCome(settings.chunk_tokens)


def make_sarathi(settings: SarathiSettings) -> Policy:
    return Policy(
        name="sarathi",
        settings=settings,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        compose=compose,
        initial_max_batch_size=settings.max_num_seqs,
    )
