"""Rounds of scrapes, taken in slices.

A round of 1,000 instances takes 20 to 60 ms, and a request that arrives meanwhile would wait for all of it. So a few
instances are taken at a time, with a short time between, in which whatever arrives comes first: a simulation does the
same at the same times. Samples are asked for when they are taken, so whoever makes them as they are asked for (a
generator) is not at it for longer either. A round of no more instances than a slice is taken at once; one that comes
while another is under way waits for it, and of those that wait the newest counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Final

from chiron.control.batch_size import BatchSizes
from chiron.control.dispatcher import Dispatcher
from chiron.control.model import ModelState
from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, Sample

SLICE: Final = 8
"""Instances; each takes 20 to 60 us, most of it the local hook."""
GAP_S: Final = 0.002
"""Between two slices."""


class Scrapes:
    """Learning, the local loop and the queues, for each slice in turn."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        models: Mapping[str, ModelState],
        instances: Mapping[int, Instance],
        sizes: BatchSizes,
        dispatcher: Dispatcher,
    ) -> None:
        self._clock = clock
        self._models = models
        self._instances = instances
        self._sizes = sizes
        self._dispatcher = dispatcher
        self._round: Iterator[Sample] | None = None
        """The one under way."""
        self._next: Iterator[Sample] | None = None
        """The one that follows it."""
        self._learned: dict[str, int] = {}
        """Scrapes of this round that were learned from, by model."""

    def sampled(self, samples: Iterable[Sample]) -> None:
        """A round of scrapes."""
        if self._round is None:
            self._begin(iter(samples))
        else:
            self._next = iter(samples)

    def _begin(self, samples: Iterator[Sample]) -> None:
        self._learned = {}
        first = list(islice(samples, SLICE + 1))
        if len(first) <= SLICE:
            self._learn(first)
        else:
            self._round = chain(first, samples)
            self._clock.call_later(GAP_S, self._take)

    def _take(self) -> None:
        """The next slice."""
        under_way, self._round = self._round, None
        assert under_way is not None
        part = list(islice(under_way, SLICE))  # Should it fail, the next round begins anew.
        if len(part) == SLICE:
            self._round = under_way
        elif self._next is not None:
            self._round, self._next, self._learned = self._next, None, {}
        if self._round is not None:
            self._clock.call_later(GAP_S, self._take)
        self._learn(part)

    def _learn(self, samples: list[Sample]) -> None:
        self._sizes.sampled(self._models, self._instances, samples, self._learned)
        for state in self._models.values():
            self._dispatcher.pump(state)
