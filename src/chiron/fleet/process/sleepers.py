"""Engine processes that sleep: alive, their weights in host memory, their GPUs free for others.

An engine is asked to sleep once it has drained, and to wake when another instance of its kind is to start on the GPUs
that it had: a process cannot change them. Each call has a deadline, and what an engine says of itself afterwards counts
more than how it answered. Whoever refuses, hangs, dies or lies is stopped, and then all is as without sleepers: GPUs
are given back, and the next start loads its weights. Its kind sleeps no more for a while, twice as long each time.

How much host memory one takes is the operator's figure, and the sum never exceeds the bound.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from chiron.core.backoff import doubled_s
from chiron.fleet.health import HealthSettings, HealthTarget, Probe
from chiron.fleet.host_memory import giving_way
from chiron.fleet.port import SleepStatus
from chiron.fleet.process.engine_process import EngineExitedError, EngineProcess
from chiron.fleet.settings import SleeperSettings
from chiron.fleet.waiting import pause
from chiron.net.client import NetError, Origin

log = logging.getLogger("chiron.fleet")

_REST_FIRST_S = 60.0
"""For so long a kind sleeps no more after one that could not; doubled with each further one."""
_REST_MAX_S = 3600.0
_BODY_MAX_BYTES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepSource:
    """How engines of a kind sleep."""

    gb: float
    """Host memory that one takes, in GB (1e9 bytes)."""
    sleep_path: str
    """``POST``: keep the weights in host memory and leave the GPUs; answered when that is done."""
    wake_path: str
    """``POST``: the way back."""
    asleep_path: str
    """``GET``: whether it sleeps, as ``{"is_sleeping": true}``."""

    def __post_init__(self) -> None:
        if not self.gb > 0:
            raise ValueError(f"sleeper_gb is {self.gb}; it must be above 0")


@dataclass(slots=True, kw_only=True, eq=False)
class HostedEngine:
    """One engine that runs, and what it holds besides its GPUs. An instance has one, and one that sleeps has none."""

    kind: str
    process: EngineProcess
    command: tuple[str, ...]
    """As it was started, but for its port: one that would be started otherwise now is of no use."""
    devices: tuple[str, ...]
    """On which it was started, and can wake."""
    log: Path
    resources: AsyncExitStack
    """Given back when it ends: process, port, log."""
    url: str = ""
    asleep: bool = False
    """It is nobody's instance."""
    to_sleep: asyncio.Event = field(default_factory=asyncio.Event)
    ending: asyncio.Task[None] | None = None

    async def end(self) -> None:
        """Returns when nothing of it is left. Who waits for that may be cancelled; the end goes on, and whoever calls
        next waits for the same."""
        if self.ending is None:
            self.ending = asyncio.get_running_loop().create_task(self.resources.aclose())
        await asyncio.shield(self.ending)

    async def end_unless_asleep(self) -> None:
        if not self.asleep:
            await self.end()


class SleepError(Exception):
    """An engine does not sleep or wake as it should; the message says why."""


@dataclass(slots=True)
class _Tally:
    wakes: int = 0
    failed_sleeps: int = 0
    failed_wakes: int = 0
    lost: int = 0
    reason: str = ""
    in_a_row: int = 0
    """Failures since the last one that woke and lasted."""
    rests_until_s: float = 0.0


class ProcessSleepers:
    """Those of one fleet. Times are the event loop's."""

    def __init__(
        self,
        sources: Mapping[str, SleepSource],
        settings: SleeperSettings,
        health: HealthSettings,
        changed: Callable[[], None],
    ) -> None:
        """``sources`` by name of the kind. ``changed``: there are more or fewer now."""
        self._sources = dict(sources)
        self._settings = settings
        self._health = health
        self._changed = changed
        self._asleep: list[HostedEngine] = []
        """Earliest first."""
        self._falling: list[HostedEngine] = []
        """Their host memory is taken already."""
        self._watches: dict[HostedEngine, asyncio.Task[None]] = {}
        self._leaving: dict[asyncio.Future[None], HostedEngine] = {}
        """Sleepers no longer, that end or wake; their host memory is taken until that is done."""
        self._tallies = {name: _Tally() for name in sources}

    @property
    def kinds(self) -> frozenset[str]:
        """Whose engines can sleep at all."""
        return frozenset(name for name, each in self._sources.items() if each.gb <= self._settings.host_memory_gb)

    def counts(self) -> dict[str, int]:
        """Sleepers by name of their kind."""
        counts: dict[str, int] = {}
        for each in self._asleep:
            counts[each.kind] = counts.get(each.kind, 0) + 1
        return counts

    def status(self, kind: str) -> SleepStatus | None:
        """None: engines of this kind cannot sleep."""
        if kind not in self._sources:
            return None
        tally, asleep = self._tallies[kind], self.counts().get(kind, 0)
        return SleepStatus(
            asleep=asleep,
            memory_gb=asleep * self._sources[kind].gb,
            wakes=tally.wakes,
            failed_sleeps=tally.failed_sleeps,
            failed_wakes=tally.failed_wakes,
            lost=tally.lost,
            reason=tally.reason,
        )

    # -- falling asleep ------------------------------------------------------------------------------------------

    async def put(self, engine: HostedEngine) -> str:
        """Empty: it sleeps. Else why it does not; it is to be stopped, if that has not been done. Waits for others to
        end or wake where their host memory is needed."""
        if engine.kind not in self.kinds:
            return "engines of its kind cannot sleep"
        tally = self._tallies[engine.kind]
        if (rests_s := tally.rests_until_s - _now_s()) > 0.0:
            return f"its kind sleeps no more for {rests_s:.0f} s: {tally.reason}"
        most_gb = self._settings.host_memory_gb
        gone = self._give_way(engine.kind)
        if gone is None:
            return f"there is no room for it in {most_gb:g} GB of host memory"
        self._falling.append(engine)
        try:
            for each in gone:
                self._stop(each)
            if self._leaving and self._used_gb((*self._asleep, *self._falling, *self._leaving.values())) > most_gb:
                await asyncio.wait(self._leaving)
            why = await self._try_to_sleep(engine)
            if why:
                await engine.end()
                return why
        finally:
            self._falling.remove(engine)
        engine.asleep = True
        self._asleep.append(engine)
        self._watches[engine] = asyncio.get_running_loop().create_task(self._watch(engine))
        self._changed()
        return ""

    def _give_way(self, kind: str) -> list[HostedEngine] | None:
        """Sleepers that are to be stopped so that another one of this kind has room. None: it has none."""
        names = giving_way(
            kind,
            self._sources[kind].gb,
            counts=self.counts(),
            sizes_gb={name: each.gb for name, each in self._sources.items()},
            used_gb=self._used_gb((*self._asleep, *self._falling)),
            memory_gb=self._settings.host_memory_gb,
        )
        if names is None:
            return None
        return [each for name in set(names) for each in self._latest(name)[: names.count(name)]]

    def _used_gb(self, engines: Iterable[HostedEngine]) -> float:
        return sum(self._sources[each.kind].gb for each in engines)

    async def _try_to_sleep(self, engine: HostedEngine) -> str:
        """Empty: it sleeps. Else why not."""
        timeout_s = self._settings.fall_asleep_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await engine.process.unless_exited(self._fall_asleep(engine))
        except TimeoutError:
            return self._failed(engine.kind, f"it did not sleep within {timeout_s:g} s", "sleep")
        except (SleepError, EngineExitedError) as error:
            return self._failed(engine.kind, str(error), "sleep")
        return ""

    async def _fall_asleep(self, engine: HostedEngine) -> None:
        path = self._sources[engine.kind].sleep_path
        await self._ask(engine, "POST", path, self._settings.fall_asleep_timeout_s)
        if not await self._says_asleep(engine):
            raise SleepError(f"it says that it is awake after POST {path}")

    async def _watch(self, engine: HostedEngine) -> None:
        """Until it is of no use any more; then it is stopped."""
        try:
            why = await engine.process.unless_exited(self._until_awake(engine))
        except EngineExitedError as error:
            why = str(error)
        self._lose(engine, why)

    def _lose(self, engine: HostedEngine, why: str) -> None:
        log.warning("a sleeper of %s is stopped: %s", engine.kind, why)
        tally = self._tallies[engine.kind]
        tally.lost += 1
        tally.reason = why
        self._stop(engine)

    async def _until_awake(self, engine: HostedEngine) -> str:
        failures = 0
        while True:
            await pause(self._health.health_period_s)
            try:
                if not await self._says_asleep(engine):
                    return "it woke unasked"
                failures = 0
            except SleepError as error:
                failures += 1
                if failures >= self._health.health_failures_max:
                    return str(error)

    # -- waking --------------------------------------------------------------------------------------------------

    def preferred(self, kind: str, count: int, free: Sequence[str]) -> Sequence[str]:
        """``free`` devices in the order in which a start that takes ``count`` of them should: where a sleeper of its
        kind can wake, else where the fewest would have to."""
        for each in self._latest(kind):
            if len(each.devices) == count and set(each.devices) <= set(free):
                return (*each.devices, *(name for name in free if name not in each.devices))
        return sorted(free, key=lambda name: sum(name in each.devices for each in self._asleep))

    def claim(self, kind: str, command: tuple[str, ...], devices: Sequence[str]) -> HostedEngine | None:
        """The latest that can wake there. It sleeps no longer, as far as this knows."""
        for engine in self._latest(kind):
            if engine.command != command:
                self._stop(engine)
            elif set(engine.devices) == set(devices):
                self._forget(engine)
                engine.asleep = False
                return engine
        return None

    async def wake(self, engine: HostedEngine, health_path: str, check_now: asyncio.Event) -> str:
        """Empty: one that was claimed is awake and answers. Else why not; it has been stopped."""
        done = asyncio.get_running_loop().create_future()
        self._leaving[done] = engine
        try:
            why = await self._try_to_wake(engine, health_path, check_now)
            if why:
                await engine.end()
                return why
        finally:
            del self._leaving[done]
            done.set_result(None)
        self._tallies[engine.kind].wakes += 1
        return ""

    async def _try_to_wake(self, engine: HostedEngine, health_path: str, check_now: asyncio.Event) -> str:
        """Empty: it is awake and answers. Else why not."""
        timeout_s = self._settings.wake_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await engine.process.unless_exited(self._wake_up(engine, health_path, check_now))
        except TimeoutError:
            return self._failed(engine.kind, f"it did not wake within {timeout_s:g} s", "wake")
        except (SleepError, EngineExitedError) as error:
            return self._failed(engine.kind, str(error), "wake")
        return ""

    def lasted(self, kind: str) -> None:
        """One that woke has been up for long enough to prove that its kind sleeps well."""
        self._tallies[kind].in_a_row = 0

    def failed_awake(self, kind: str, why: str) -> None:
        """One that woke is dead before it has lasted."""
        self._failed(kind, f"soon after it woke: {why}", "wake")

    async def _wake_up(self, engine: HostedEngine, health_path: str, check_now: asyncio.Event) -> None:
        path = self._sources[engine.kind].wake_path
        await self._ask(engine, "POST", path, self._settings.wake_timeout_s)
        if await self._says_asleep(engine):
            raise SleepError(f"it says that it sleeps after POST {path}")
        probe = Probe(HealthTarget(url=engine.url, path=health_path), self._health)
        try:
            await probe.until_passed(check_now)
        finally:
            await probe.close()

    # -- stopping ------------------------------------------------------------------------------------------------

    def keep(self, kind: str, most: int) -> None:
        """Stop what is beyond so many of a kind."""
        for engine in self._latest(kind)[: max(0, self.counts().get(kind, 0) - most)]:
            self._stop(engine)

    def leave(self, devices: Sequence[str], kind: str) -> None:
        """Stop those on these GPUs: engines of ``kind`` fail to start there, and sleepers keep some of the memory."""
        for engine in [each for each in self._asleep if not set(each.devices).isdisjoint(devices)]:
            self._lose(engine, f"engines of {kind!r} fail to start on its GPUs")

    async def close(self) -> None:
        """Stop all, side by side; those that fall asleep are still their instances'."""
        for engine in list(self._asleep):
            self._stop(engine)
        if self._leaving:
            await asyncio.wait(self._leaving)

    def _stop(self, engine: HostedEngine) -> None:
        self._forget(engine)
        task = asyncio.get_running_loop().create_task(engine.end())
        self._leaving[task] = engine
        task.add_done_callback(self._leaving.pop)

    def _forget(self, engine: HostedEngine) -> None:
        self._asleep.remove(engine)
        watch = self._watches.pop(engine)
        if watch is not asyncio.current_task():
            watch.cancel()
        self._changed()

    # -- the rest ------------------------------------------------------------------------------------------------

    def _latest(self, kind: str) -> list[HostedEngine]:
        """Sleepers of a kind, the latest first."""
        return [each for each in reversed(self._asleep) if each.kind == kind]

    def _failed(self, kind: str, why: str, what: str) -> str:
        tally = self._tallies[kind]
        tally.reason = why
        tally.failed_sleeps += what == "sleep"
        tally.failed_wakes += what == "wake"
        tally.rests_until_s = _now_s() + doubled_s(_REST_FIRST_S, _REST_MAX_S, tally.in_a_row)
        tally.in_a_row += 1
        return why

    async def _says_asleep(self, engine: HostedEngine) -> bool:
        path = self._sources[engine.kind].asleep_path
        body = await self._ask(engine, "GET", path, self._health.health_timeout_s)
        try:
            said = json.loads(body)["is_sleeping"]
        except (ValueError, TypeError, KeyError, RecursionError):
            said = None
        if not isinstance(said, bool):
            raise SleepError(f"GET {path} does not say whether it sleeps")
        return said

    async def _ask(self, engine: HostedEngine, method: str, path: str, timeout_s: float) -> bytes:
        """Raises SleepError for what is no good answer."""
        origin = Origin(engine.url, connect_timeout_s=timeout_s, keepalive=False)
        try:
            answer = await origin.fetch(method, path, timeout_s=timeout_s, body_max=_BODY_MAX_BYTES)
        except NetError as error:
            raise SleepError(f"{method} {path}: {error}") from None
        finally:
            await origin.close()
        if answer.status != 200:
            raise SleepError(f"{method} {path} answers with status {answer.status}")
        return answer.body


def _now_s() -> float:
    return asyncio.get_running_loop().time()
