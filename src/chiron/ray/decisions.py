"""How many replicas a deployment should have, by a fleet policy, from a load that is told many times a second.

The policy's ``fleet`` hook is asked once in its own period; between two ticks its ``prepare`` hook works. Everything
that is remembered is in a value that the caller keeps: Ray Serve hands it back at the next call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from chiron.config.policies import read_policy
from chiron.engines.profile_store import load_profile
from chiron.policies.defaults import keep_fleet
from chiron.policies.registry import POLICIES
from chiron.policies.views import PolicyState
from chiron.ray.load import ServeLoad, Workload, ends_per_s, fleet_view

SECONDS_MAX = 120
"""Of arrivals that one tick is told; a longer silence is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Between two calls. Seconds since the first."""

    origin_s: float
    """The caller's time at the first call."""
    seen_s: float = 0.0
    """Last call."""
    tick_s: float | None = None
    """Last tick."""
    arrived: float = 0.0
    """Requests since then."""
    total: float | None = None
    """Requests in the deployment at the last call."""
    carried: float = 0.0
    """Part of a request that the last tick could not be told."""
    target: int | None = None
    reason: str = ""
    fleet: PolicyState = None


class Decisions:
    """Of one deployment."""

    def __init__(
        self, *, policy: str, settings: Mapping[str, Any], profile: str, workload: Workload, name: str = "deployment"
    ) -> None:
        """Raises ValueError for a policy, a setting or a profile that there is not."""
        choice = read_policy(policy, dict(settings))
        self.policy = POLICIES[choice.policy].make(choice.settings)
        self.profile = load_profile(profile)
        self.workload = workload
        self._name = name

    def decide(self, load: ServeLoad, time_s: float, memory: Memory | None) -> Memory:
        """``time_s``: the caller's clock. The decision is ``target``, within the bounds; with figures that are missing
        it is what it was."""
        memory = memory if memory is not None else Memory(origin_s=time_s)
        now_s = time_s - memory.origin_s
        if now_s < memory.seen_s:  # Somebody has set the clock back.
            memory = replace(memory, origin_s=time_s - memory.seen_s)
            now_s = memory.seen_s
        if not load.sound:
            return self._kept(replace(memory, seen_s=now_s), load, "the load is not known")
        total = load.running + load.queued
        ended = ends_per_s(self.workload, self.profile, load) * (now_s - memory.seen_s)
        more = total - memory.total if memory.total is not None else 0.0
        memory = replace(memory, seen_s=now_s, arrived=memory.arrived + ended + more, total=total)
        nothing_there = load.target == 0 and total > 0
        due = memory.tick_s is None or now_s - memory.tick_s >= self.policy.fleet_period_s
        if due or nothing_there:
            return self._tick(memory, load, now_s)
        return self._kept(self._prepared(memory), load, memory.reason)

    def _tick(self, memory: Memory, load: ServeLoad, now_s: float) -> Memory:
        before_s = memory.tick_s if memory.tick_s is not None else now_s
        arrived, carried = _spread(memory.arrived + memory.carried, int(before_s), int(now_s))
        view = fleet_view(
            name=self._name,
            workload=self.workload,
            profile=self.profile,
            load=load,
            arrived=arrived,
            now_s=now_s,
            since_s=now_s - before_s,
        )
        plan, state = (self.policy.fleet or keep_fleet)(self.policy.settings, memory.fleet, view)
        memory = replace(memory, tick_s=now_s, arrived=0.0, carried=carried, fleet=state)
        own = plan.get(self._name)
        if own is None:
            return self._kept(memory, load, "the policy leaves it as it is")
        target = min(max(sum(own.counts.values()), load.least), load.most)
        return replace(memory, target=target, reason=own.reason)

    def _prepared(self, memory: Memory) -> Memory:
        if self.policy.prepare is None:
            return memory
        state = self.policy.prepare(self.policy.settings, memory.fleet)
        return memory if state is None else replace(memory, fleet=state)

    def _kept(self, memory: Memory, load: ServeLoad, reason: str) -> Memory:
        target = memory.target if memory.target is not None else load.target
        return replace(memory, target=min(max(target, load.least), max(load.most, load.least)), reason=reason)


def _spread(arrived: float, first: int, end: int) -> tuple[tuple[tuple[int, int], ...], float]:
    """Whole requests over the seconds from ``first`` to before ``end``, evenly, and what is left."""
    seconds = range(max(first, end - SECONDS_MAX), end)
    if not seconds:
        return (), arrived
    told, found = 0, []
    if arrived <= 0.0:
        return (), arrived
    for number, second in enumerate(seconds, 1):
        until = int(arrived * number / len(seconds))
        if until > told:
            found.append((second, until - told))
        told = until
    return tuple(found), arrived - told
