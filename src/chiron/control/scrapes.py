"""Rounds of scrapes, taken in slices.

A round of 1,000 instances takes 20 to 60 ms, and a request that arrives meanwhile would wait for all of it. So a few
instances are taken at a time, with a short time between, in which whatever arrives comes first: a simulation does the
same at the same times. A round of no more instances than a slice is taken at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
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
        self._pending: dict[int, Sample] = {}
        """What is still to be taken, by instance; never more than one for each."""
        self._under_way = False
        self._learned: dict[str, int] = {}
        """Scrapes of this round that were learned from, by model."""

    def sampled(self, samples: Iterable[Sample]) -> None:
        """A round of scrapes."""
        pending = self._pending
        for sample in samples:
            known = pending.get(sample.instance_id)
            if sample.instance_id in self._instances and (known is None or sample.taken_s > known.taken_s):
                pending[sample.instance_id] = sample
        self._learned = {}
        if self._under_way:
            return
        if len(pending) <= SLICE:
            self._take()
        else:
            self._under_way = True
            self._clock.call_later(GAP_S, self._take)

    def _take(self) -> None:
        pending = self._pending
        part = [pending.pop(number) for number in list(islice(pending, SLICE))]
        self._under_way = bool(pending)
        if pending:
            self._clock.call_later(GAP_S, self._take)
        self._sizes.sampled(self._models, self._instances, part, self._learned)
        for state in self._models.values():
            self._dispatcher.pump(state)
