"""Looks at every engine now and then: its own metrics if it has any, and what the gateway saw of it in any case.

A scrape that fails or is late costs nothing but precision: the sample is made from what the gateway saw.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from chiron.core.ports import Samples, StageSamples
from chiron.core.types import Sample
from chiron.engines.metrics import read_row
from chiron.gateway.instances.engine import InstanceEngine
from chiron.gateway.instances.stages import read_stages
from chiron.gateway.relay.context_limit import ask_context
from chiron.net.client import Asked, NetError
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.scrape")

METRICS_MAX_BYTES = 4 * 1024 * 1024
TIMEOUT_MAX_S = 2.0
LATE = 0.25
"""A round that comes so large a share of a period late was held up."""


class Scraper:
    """Every ``period_s``: samples of all engines to the control plane."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        samples: Samples,
        engines: Mapping[int, InstanceEngine],
        period_s: float,
        capacity_told: Callable[[InstanceEngine, int], None],
        context_told: Callable[[InstanceEngine], None],
        stages: Sequence[StageSamples] = (),
    ) -> None:
        """``capacity_told`` hears of the KV capacity (tokens) that an engine's metrics state, ``context_told`` of an
        engine whose context is known from now on, ``stages`` of the stages of engines that are pipelines."""
        self._clock = clock
        self._samples = samples
        self._engines = engines
        self._period_s = period_s
        self._capacity_told = capacity_told
        self._context_told = context_told
        self._stages = stages
        self._round: asyncio.Task[None] | None = None
        self._settled_s = 0.0
        self._settling = False

    def begin(self) -> None:
        """Posted: the first round one period from now."""
        self._clock.call_later(self._period_s, self._due)

    def _due(self) -> None:
        self._clock.call_later(self._period_s, self._due)
        if self._settles(self._clock.elapsed_s()):
            return
        if self._round is None or self._round.done():
            engines = list(self._engines.values())
            asked = [
                (engine, engine.origin.ask("GET", engine.row.metrics_path, body_max=METRICS_MAX_BYTES))
                for engine in engines
                if engine.row.metrics_path
            ]
            self._round = asyncio.get_running_loop().create_task(self._scrape(engines, asked))

    def _settles(self, now_s: float) -> bool:
        """Whether this look is better left out: the gateway was held up, and what engines sent meanwhile is still to
        be read. Between this look and the next they would seem to have been slow, and then many times too fast."""
        if now_s >= self._settled_s:
            late = now_s - self._clock.now_s > LATE * self._period_s
            self._settling = late and not self._settling  # A gateway that is always late looks every other time.
            if self._settling:
                self._settled_s = now_s + LATE * self._period_s
        return now_s < self._settled_s

    async def _scrape(self, engines: list[InstanceEngine], asked: list[tuple[InstanceEngine, Asked]]) -> None:
        # One slow engine must not keep the others' news.
        await asyncio.gather(
            *(self._read(engine, metrics) for engine, metrics in asked),
            *(self._ask_context(engine) for engine in engines if engine.context_tokens is None),
            *(self._ask_stages(engine) for engine in engines if engine.row.stages_path and self._stages),
        )
        self._clock.post(lambda: self._tell(engines))

    async def _read(self, engine: InstanceEngine, asked: Asked) -> None:
        try:
            answer = await asked.answer(min(self._period_s, TIMEOUT_MAX_S))
        except NetError as error:
            engine.metrics = {}
            log.debug("%s: no metrics: %s", engine.url, error)
            return
        engine.metrics = read_row(engine.row, answer.body.decode("utf-8", "replace")) if answer.status == 200 else {}

    async def _ask_context(self, engine: InstanceEngine) -> None:
        engine.context_tokens = await ask_context(engine.origin, engine.row, engine.model, engine.authorization)
        if engine.context_tokens is not None:
            self._clock.post(lambda: self._context_told(engine))

    async def _ask_stages(self, engine: InstanceEngine) -> None:
        asked = engine.origin.ask("GET", engine.row.stages_path, body_max=METRICS_MAX_BYTES)
        try:
            answer = await asked.answer(min(self._period_s, TIMEOUT_MAX_S))
        except NetError as error:
            log.debug("%s: no stages: %s", engine.url, error)
            return

        def tell() -> None:
            sample = read_stages(answer.body, self._clock.now_s) if answer.status == 200 else None
            if sample is not None and not engine.closed:
                for each in self._stages:
                    each.stages_sampled(engine.instance, sample)

        self._clock.post(tell)

    def _tell(self, engines: list[InstanceEngine]) -> None:
        self._samples.sampled(self._sampled(engines))

    def _sampled(self, engines: list[InstanceEngine]) -> Iterator[Sample]:
        """Made when they are taken: of many engines it is work for a while."""
        for engine in engines:
            if engine.closed:
                continue
            capacity = int(engine.metrics.get("kv_capacity_tokens", 0))
            if capacity > 0 and capacity != engine.instance.kv_capacity_tokens:
                self._capacity_told(engine, capacity)
            own_limit = engine.own_limit.look(engine.metrics, engine.instance.max_batch_size)
            if own_limit:
                log.warning(
                    "%s runs %d requests at once and queues others inside, though its max batch size here is %d; "
                    "set max_num_seqs of kind %r to the engine's own limit",
                    engine.url,
                    own_limit,
                    engine.instance.max_batch_size,
                    engine.instance.kind.name,
                )
            yield engine.observer.sample(self._clock.now_s, engine.metrics)
