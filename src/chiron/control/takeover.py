"""A control plane that follows another one, whose instances and requests still run.

What its predecessor knew of the moment is told anew: each instance that is up, and by those who relay its answers each
request that runs there. Until all have told, or for a settling time at the most, nobody knows how full an instance is:
nothing is dispatched to it, requests that arrive are held, and no fleet grows or shrinks. From then on all is as
always. An instance may turn out to run more than its max batch size allows (the limit was lowered, a relay was late):
it gets nothing new until it is below. One that its fleet has not found yet gets nothing new either. Requests that
waited when the predecessor died arrive again, with the time of their first arrival; what a store knows of batch work
comes from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Final

from chiron.control.dispatcher import Dispatcher
from chiron.control.lifecycle import Lifecycle
from chiron.control.model import ModelState
from chiron.core.clock import Timer, VirtualClock
from chiron.core.ports import Engine
from chiron.core.types import Instance, Request, Role

SETTLE_S: Final = 3.0
"""A relay that has not said by then what runs where is not waited for."""


class Takeover:
    """Nothing happens here unless ``begin`` was called."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        models: Mapping[str, ModelState],
        lifecycle: Lifecycle,
        dispatcher: Dispatcher,
        wake: Callable[[], None],
    ) -> None:
        """``wake``: something may wait for an instance that nobody has asked for."""
        self._clock = clock
        self._models = models
        self._lifecycle = lifecycle
        self._dispatcher = dispatcher
        self._wake = wake
        self._timer: Timer | None = None
        self._told: set[int] = set()
        """Requests that were said to run, by id, while it settles."""
        self._unfound: set[int] = set()
        """Instances that nobody but who told of them has seen: they get nothing new."""
        self._initial: dict[str, int] = {}
        """Instances to begin with, by model: what is missing of them once it has settled."""

    @property
    def settling(self) -> bool:
        return self._lifecycle.unsettled

    def begin(self, settle_s: float) -> None:
        self._lifecycle.unsettled = True
        self._timer = self._clock.call_later(settle_s, self.settled)

    def initial(self, model: str, count: int) -> None:
        self._initial[model] = count

    def instance(
        self,
        state: ModelState,
        kind: str,
        role: Role,
        *,
        number: int,
        max_batch_size: int,
        attach: Callable[[Instance], Engine],
        found: bool,
    ) -> Instance | None:
        """One that is up; ``found``: its fleet knows of it. None: it is known already, or no kind of the model has this
        name."""
        instance = self._lifecycle.adopt_one(
            state, kind, role, number=number, max_batch_size=max_batch_size, attach=attach
        )
        if instance is not None and not found:
            self._unfound.add(instance.id)
        if instance is not None and (self.settling or not found):
            state.router.remove(instance)
            instance.avoided_until_s = inf
        return instance

    def found(self, state: ModelState, instance: Instance) -> None:
        """Its fleet has found one that was taken over. Harmless for any other, and twice."""
        if instance.id in self._unfound:
            self._unfound.remove(instance.id)
            if not self.settling:
                self._open(state, instance)

    def _open(self, state: ModelState, instance: Instance) -> None:
        """Nothing new was dispatched there until now."""
        instance.avoided_until_s = -1.0
        if instance.state == "ready":
            state.router.add(instance)

    def running(
        self,
        state: ModelState,
        instance: Instance,
        request: Request,
        *,
        epoch: int,
        tokens_done: int,
        dispatch_s: float,
        first_token_s: float,
    ) -> bool:
        """A request that runs there. False: it cannot be taken in, and must be stopped where it runs: its instance is
        not up, or it has been told already."""
        number = request.id
        if instance.state not in ("ready", "draining") or request.submitted or number in self._told:
            return False
        if number in instance.requests or number in instance.evicting:
            return False
        if self.settling:
            self._told.add(number)
        now_s = self._clock.now_s
        request.epoch = max(0, epoch - 1)  # Booking it makes it the epoch that its relay knows.
        request.tokens_done = max(0, tokens_done)
        request.dispatch_s = min(max(dispatch_s, request.arrival_s), now_s)
        request.first_token_s = min(max(first_token_s, request.dispatch_s), now_s) if first_token_s >= 0.0 else -1.0
        request.ran = first_token_s >= 0.0
        self._dispatcher.resumed(state, request, instance)
        return True

    def settled(self) -> None:
        """All that runs has been told, or nobody is waited for any more."""
        if not self.settling:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._lifecycle.unsettled = False
        self._told.clear()
        for name, state in self._models.items():
            for instance in list(state.instances.values()):
                if instance.leaving:
                    self._lifecycle.leaving(state, instance)
                elif instance.avoided_until_s == inf and instance.id not in self._unfound:
                    self._open(state, instance)
            if name in self._initial:
                self._lifecycle.request_missing(state, self._initial.pop(name))
            self._dispatcher.pump(state)
        self._wake()
