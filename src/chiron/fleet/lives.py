"""What real fleets have in common: each instance is a task, from ``create`` until nothing of it is left.

A fleet supplies ``serve``: bring the instance up, say ``ready``, watch it; raise InstanceFailedError when it fails.
Whatever it has acquired goes on ``Life.held`` and is given back however the life ends. The control plane hears of a
failure at once, before the giving back, which may take a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from chiron.core.ports import Engine, FleetEvents
from chiron.core.types import Instance
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.fleet")

_REASONS_KEPT = 1000


class InstanceFailedError(Exception):
    """An instance could not be started, or is dead; the message says why."""


class Life:
    """One instance in the fleet's hands."""

    __slots__ = ("began_s", "held", "instance", "poke", "ready_s")

    def __init__(self, instance: Instance, now_s: float) -> None:
        self.instance = instance
        self.began_s = now_s
        """The loop's time at which its start began; waiting before that does not count."""
        self.ready_s: float | None = None
        self.held = AsyncExitStack()
        self.poke = asyncio.Event()
        """Asks for a health check now."""


class Lives:
    """The instances of one fleet."""

    def __init__(self, *, clock: LiveClock, serve: Callable[[Life], Awaitable[None]]) -> None:
        self.listener: FleetEvents | None = None
        self.closed = False
        self.reasons: dict[int, str] = {}
        """Why instances failed, by id; the latest thousand."""
        self._clock = clock
        self._serve = serve
        self._lives: dict[int, Life] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, instance: Instance) -> None:
        assert instance.id not in self._lives, f"instance {instance.id} exists already"
        if self.closed:
            return
        loop = asyncio.get_running_loop()
        life = Life(instance, loop.time())
        self._lives[instance.id] = life
        task = loop.create_task(self._live(life), name=f"instance-{instance.id}")
        self._tasks[instance.id] = task
        task.add_done_callback(lambda task: self._gone(instance.id, task))

    def end(self, instance: Instance) -> None:
        """The listener hears nothing more of it. Harmless if it has failed or was ended before."""
        if self._lives.pop(instance.id, None) is not None:
            self._tasks[instance.id].cancel()

    def suspect(self, instance: Instance) -> None:
        life = self._lives.get(instance.id)
        if life is not None:
            life.poke.set()

    def ready(self, life: Life, attach: Callable[[], Engine]) -> None:
        """Tell the listener, unless the instance was removed in the same moment."""
        life.ready_s = asyncio.get_running_loop().time()
        life.poke.clear()

        def tell() -> None:
            if self._is_alive(life):
                assert life.ready_s is not None
                life.instance.began_s = self._clock.now_s - (life.ready_s - life.began_s)
                assert self.listener is not None, "a fleet needs its listener before its first instance"
                self.listener.instance_ready(life.instance, attach())

        self._clock.post(tell)

    async def close(self, timeout_s: float) -> None:
        """End all, side by side."""
        self.closed = True
        for life in list(self._lives.values()):
            self.end(life.instance)
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)

    async def _live(self, life: Life) -> None:
        try:
            await self._serve(life)
        except asyncio.CancelledError:
            if self._is_alive(life):
                raise  # Not ``end``: the whole program is being cancelled.
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        except InstanceFailedError as error:
            self._failed(life, str(error))
        except Exception as error:
            log.exception("instance %d of %s failed unexpectedly", life.instance.id, life.instance.model)
            self._failed(life, f"{type(error).__name__}: {error}")
        finally:
            await life.held.aclose()

    def _failed(self, life: Life, reason: str) -> None:
        instance = life.instance

        def tell() -> None:
            if self._is_alive(life):
                del self._lives[instance.id]
                log.warning("instance %d of %s failed: %s", instance.id, instance.model, reason)
                self.reasons[instance.id] = reason
                if len(self.reasons) > _REASONS_KEPT:
                    del self.reasons[next(iter(self.reasons))]
                assert self.listener is not None
                self.listener.instance_failed(instance)

        self._clock.post(tell)

    def _is_alive(self, life: Life) -> bool:
        return self._lives.get(life.instance.id) is life

    def _gone(self, instance_id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[instance_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler({"message": "ending an instance failed", "exception": error})
