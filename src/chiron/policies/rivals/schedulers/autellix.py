"""``autellix``: Autellix (2025), which serves calls by what their programs have had, in every engine of a fixed fleet.

A process table knows what each program has had. A new call of it is put into a queue by that, and all but the first
queue serve it for a quantum at a time::

    priority   : PLAS   the service of all calls of the program that have ended
                 ATLAS  the longest service along its calls that wait for each other, as far as it is known: a call
                        inherits what the program has when it comes, and at its end the program has the larger of what
                        it has and inherited + own
    queues     : by boundaries of that; first come, first served in each; one that has had its quantum goes to the end
                 of the next; a better queue takes places back from a worse one, KV is swapped to host memory
    starvation : once (waited by its program and it) / (served to its program and it) reaches beta, a call goes to the
                 first queue, and the call's own part of both starts again at 0
    balancing  : a call of up to ``locality_tokens`` goes to the engine with the fewest requests, a longer one to the
                 one that its program is pinned to

A request without a program is a program of one call: it starts in the first queue and sinks.

Sources: arXiv 2502.13965; 2,048 tokens are its own, boundaries, quanta and beta are not published. What is filled in
is in docs/policies/schedulers.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any, Final, Literal

from chiron.core.types import Instance, Placement, Request
from chiron.policies.checks import above, at_least
from chiron.policies.composers.leveled import LeveledComposer
from chiron.policies.policy import Estimates, Policy
from chiron.policies.ranges import AnyOf, Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.routers.least import LeastRouter
from chiron.policies.size import placed, prompt_tokens

PROGRAMS_MAX: Final = 100_000
"""Programs that are remembered. None says that it has ended: the key that has most of them then forgets the one that
was heard of longest ago."""
_DUST_S: Final = 1e-6
"""That sums of times leave behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutellixSettings:
    priority: Literal["atlas", "plas"] = "atlas"
    boundaries_s: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    """Service with which a new call begins in the second queue, the third, and so on."""
    quanta_s: tuple[float, ...] = (2.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    """Service in each queue but the last."""
    beta: float = 8.0
    """Waited over served, from which a call starves."""
    every_steps: int = 8
    """Steps between two decisions about who gives way."""
    preempts: bool = True
    """False: calls that decode go on until they end."""
    queues: Annotated[bool, AnyOf((True, False))] = True
    """False: engines serve calls in their own order, and programs are only kept where they are: what runs live, too."""
    locality_tokens: int = 2048
    """Prompts up to this go anywhere (the paper's)."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "beta", "every_steps", "max_num_seqs")
        at_least(0, self, "locality_tokens", "instances")
        bounds = self.boundaries_s
        if list(bounds) != sorted(set(bounds)) or any(not 0 < bound < inf for bound in bounds):
            raise ValueError(
                f"boundaries_s are {bounds}; each must be finite and above the one before, the first above 0"
            )
        if len(self.quanta_s) != len(bounds) or any(not 0 < quantum < inf for quantum in self.quanta_s):
            raise ValueError(
                f"quanta_s are {self.quanta_s}; there must be {len(bounds)}, as boundaries_s, each above 0"
            )


class Program:
    """A row of the process table."""

    __slots__ = ("instance_id", "ran_s", "service_s", "waited_s")

    def __init__(self) -> None:
        self.service_s = 0.0
        """By the priority in force."""
        self.ran_s = 0.0
        """Of all calls that ended."""
        self.waited_s = 0.0
        self.instance_id = -1
        """The engine it is pinned to."""


class _Call:
    __slots__ = (
        "inherited_s",
        "level",
        "level_s",
        "own_s",
        "own_waited_s",
        "program",
        "ran_s",
        "runs",
        "since_s",
        "waited_s",
    )

    def __init__(self, program: Program, level: int, since_s: float) -> None:
        self.program = program
        self.inherited_s = program.service_s
        self.level = level
        self.level_s = 0.0
        """Service in this queue."""
        self.runs = False
        self.since_s = since_s
        self.ran_s = 0.0
        self.waited_s = 0.0
        self.own_s = 0.0
        """Service, and waiting, since it was last promoted."""
        self.own_waited_s = 0.0


class ProcessTable:
    """What programs have had, and which queue each of their calls is in; implements
    ``policies.composers.leveled.Levels`` for all engines."""

    def __init__(self, settings: AutellixSettings) -> None:
        self._settings = settings
        self._programs: dict[str, dict[str, Program]] = {}
        """By tenant and name."""
        self._count = 0
        self._calls: dict[int, _Call] = {}

    def program(self, request: Request) -> Program:
        """A new one of a request that has none."""
        if not request.program:
            return Program()
        own = self._programs.setdefault(request.tenant, {})
        found = own.pop(request.program, None)
        if found is None:
            found = Program()
            self._count += 1
        own[request.program] = found
        if self._count > PROGRAMS_MAX:
            most = max(self._programs.values(), key=len)
            del most[next(iter(most))]
            self._count -= 1
        return found

    def ended(self, request: Request, now_s: float) -> None:
        call = self._calls.pop(request.id, None)
        if call is None:
            return
        self._advance(call, now_s)
        program = call.program
        program.ran_s += call.ran_s
        program.waited_s += call.waited_s
        if self._settings.priority == "plas":
            program.service_s += call.ran_s
        else:
            program.service_s = max(program.service_s, call.inherited_s + call.ran_s)

    # -- levels ----------------------------------------------------------------------------------------------------

    def enters(self, request: Request) -> bool:
        call = self._calls.get(request.id)
        if call is not None:
            had_place, call.runs = call.runs, False  # Nobody said when: since it was last asked about, it waits.
            return had_place
        program = self.program(request)
        level = bisect_right(self._settings.boundaries_s, program.service_s)
        self._calls[request.id] = _Call(program, level, request.arrival_s)
        return False

    def starts(self, request: Request, now_s: float) -> None:
        self._turns(request, now_s, runs=True)

    def stops(self, request: Request, now_s: float) -> None:
        self._turns(request, now_s, runs=False)

    def _turns(self, request: Request, now_s: float, *, runs: bool) -> None:
        call = self._calls.get(request.id)
        if call is not None:
            self._advance(call, now_s)
            call.runs = runs

    def level(self, request: Request, now_s: float, made: int) -> int:
        call, quanta_s = self._calls.get(request.id), self._settings.quanta_s
        if call is None:
            return len(quanta_s)  # It was called off.
        self._advance(call, now_s)
        while call.level < len(quanta_s) and call.level_s >= quanta_s[call.level]:
            call.level_s -= quanta_s[call.level]
            call.level += 1
        if not call.runs and call.level and call.since_s >= self._starves_s(call) - _DUST_S:
            call.level, call.level_s, call.own_s, call.own_waited_s = 0, 0.0, 0.0, 0.0
        return call.level

    def better_s(self, request: Request) -> float:
        call = self._calls.get(request.id)
        return inf if call is None or not call.level else self._starves_s(call)

    def _starves_s(self, call: _Call) -> float:
        """When it has waited for beta times what it was served, if it waits on."""
        program = call.program
        served_s, waited_s = program.ran_s + call.own_s, program.waited_s + call.own_waited_s
        return call.since_s + self._settings.beta * served_s - waited_s

    def _advance(self, call: _Call, now_s: float) -> None:
        passed_s = max(0.0, now_s - call.since_s)
        call.since_s = max(call.since_s, now_s)
        if call.runs:
            call.ran_s += passed_s
            call.own_s += passed_s
            call.level_s += passed_s
        else:
            call.waited_s += passed_s
            call.own_waited_s += passed_s


class LocalityRouter:
    """Short prompts to the engine with the fewest requests, long ones to that of their program."""

    def __init__(self, settings: AutellixSettings, estimates: Estimates, table: ProcessTable) -> None:
        self.room_tokens = 0
        self._settings = settings
        self._estimates = estimates
        self._table = table
        self._least = LeastRouter(estimates, lambda instance: len(instance.requests))
        self._open: dict[int, Instance] = {}

    def add(self, instance: Instance) -> None:
        self._open[instance.id] = instance
        self._least.add(instance)

    def remove(self, instance: Instance) -> None:
        self._open.pop(instance.id, None)
        self._least.remove(instance)

    def changed(self, instance: Instance) -> None:
        self._least.changed(instance)

    def place(self, request: Request, waited_s: float) -> Placement | None:
        if not request.program or prompt_tokens(request) <= self._settings.locality_tokens:
            return self._least.place(request, waited_s)
        program = self._table.program(request)
        pinned = self._open.get(program.instance_id)
        if pinned is not None and prompt_tokens(request) < pinned.kv_capacity_tokens:
            return placed(self._estimates, request, pinned)
        placement = self._least.place(request, waited_s)
        if placement is not None:
            program.instance_id = placement.instance.id
        return placement

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()


def make_autellix(settings: AutellixSettings) -> Policy:
    table = ProcessTable(settings)

    def place(_: Any, estimates: Estimates) -> LocalityRouter:
        return LocalityRouter(settings, estimates, table)

    def compose(_: Any, estimates: Estimates) -> LeveledComposer:
        return LeveledComposer(table, every_steps=settings.every_steps, preempts=settings.preempts)

    def ended(_: Any, request: Request, now_s: float) -> None:
        table.ended(request, now_s)

    return Policy(
        name="autellix",
        settings=settings,
        place=place,
        compose=compose if settings.queues else None,
        ended=ended,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        initial_max_batch_size=settings.max_num_seqs,
    )
