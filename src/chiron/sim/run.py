"""One simulation: the control plane, a model fleet of model engines, and a workload, under virtual time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from math import isfinite
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from chiron.control.learned import Learned
from chiron.core.clock import VirtualClock
from chiron.core.types import Request
from chiron.fleet.model import FleetModel
from chiron.policies.chiron.scheduled import CLAIRVOYANT, make_scheduled
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.policy import ComposeHook, Composer, Policy
from chiron.policies.registry import make_policy
from chiron.policies.stages.registry import with_stages
from chiron.runtime.assembly import Assembly
from chiron.runtime.modelled import ModelledEngines, ModelScraper
from chiron.sim.bound import Bound, bound, bound_of_run
from chiron.sim.cascades import CascadeCalls
from chiron.sim.clairvoyant import found
from chiron.sim.programs import ProgramCalls
from chiron.sim.recorder import Recorder
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import ProgramPoint, RequestTable
from chiron.telemetry.summary import LostCalls, summarise
from chiron.workload.types import Workload

REVERSAL_WINDOW_S = 60.0
"""A plan change against the previous one's direction within this time counts as a reversal, for every policy."""
_CHUNK = 65_536

Progress = Callable[[float], None]


def simulate(
    setup: Setup,
    *,
    progress: Progress | None = None,
    step_mode: bool = False,
    events: TextIO | None = None,
    with_bound: bool = True,
) -> Result:
    """Run one policy on one workload.

    ``progress`` hears the fraction of requests that ended. ``step_mode`` simulates every engine step by itself: the
    slow oracle of the default, with equal results. ``events`` gets a JSON line per event. ``with_bound=False`` skips
    the lower bound (its figures are then 0).
    """
    started = time.perf_counter()
    learned = None if setup.history is None else _lived_through(setup, setup.history, step_mode=step_mode)
    if setup.policy == CLAIRVOYANT and setup.settings.schedules is None:
        setup = found(setup, lambda tried: _ran(tried, learned, step_mode=step_mode).result(with_bound=False))
    simulation = _ran(setup, learned, step_mode=step_mode, events=events, progress=progress)
    return simulation.result(wall_s=time.perf_counter() - started, with_bound=with_bound)


def _ran(
    setup: Setup,
    learned: Learned | None,
    *,
    step_mode: bool,
    events: TextIO | None = None,
    progress: Progress | None = None,
) -> Simulation:
    simulation = Simulation(setup, step_mode=step_mode, events=events)
    if learned is not None:
        simulation.plane.restore(learned, 0.0)
    collecting = gc.isenabled()
    gc.disable()  # Nothing here is cyclic garbage in quantity; scanning a million requests again and again is costly.
    try:
        simulation.run(progress)
    finally:
        if collecting:
            gc.enable()
    return simulation


def _lived_through(setup: Setup, history: Workload, *, step_mode: bool) -> Learned:
    """What the policy has learned by the end of the history: from its own fleet's life, as it would have been."""
    past = replace(setup, workload=history, history=None, horizon_s=float(history.arrival_s[-1]) + 1.0)
    if past.policy == CLAIRVOYANT:  # Its schedule is for what comes.
        past = replace(past, policy="chiron", settings=ChironSettings())
    simulation = Simulation(past, step_mode=step_mode)
    simulation.run()
    return simulation.plane.learned(0.0)


class Simulation:
    """The parts of a run, wired; for tests and tools that look inside. Most callers want ``simulate``."""

    def __init__(
        self,
        setup: Setup,
        *,
        step_mode: bool = False,
        events: TextIO | None = None,
        clock: VirtualClock | None = None,
    ) -> None:
        self.setup = setup
        self.clock = clock or VirtualClock()
        self.recorder = Recorder(setup.workload, events)
        clairvoyant = setup.policy == CLAIRVOYANT
        self.policy = make_scheduled(setup.settings) if clairvoyant else make_policy(setup.policy, setup.settings)
        if setup.stage_policy:
            self.policy = with_stages(self.policy, setup.stage_policy, setup.stage_settings)
        compose = self.policy.compose
        engines = ModelledEngines(
            clock=self.clock,
            profiles=setup.profiles,
            stages=setup.stages,
            kv_transfer_gb_per_s=setup.kv_transfer_gb_per_s,
            wire=setup.wire,
            step_mode=step_mode,
            prefix_cache=setup.prefix_cache,
            compose=None if compose is None else partial(self._composer, compose),
            route=None if self.policy.route is None else partial(self.policy.route, self.policy.stages_settings),
        )
        self.engines = engines.made
        self.fleet = FleetModel(
            clock=self.clock,
            cold_start=setup.cold_start,
            failures=setup.failures,
            seed=setup.seed,
            make_engine=engines.make,
            notice_s=0.0 if setup.wire is None else setup.wire.notice_s,
            sleep=setup.sleep,
            gpus_max=setup.gpus_max,
        )
        engines.suspect = self.fleet.suspect
        engines.fleet = self.fleet
        self._extends: list[bool] = []
        self._cuts: list[int] = []
        if setup.prefix_cache and setup.workload.programs is not None:
            self._extends = setup.workload.programs.extends.tolist()
            self._cuts = setup.workload.programs.cuts(
                setup.workload.input_tokens.tolist(), setup.workload.output_tokens.tolist()
            )
        self.programs: ProgramCalls | None = None
        if setup.workload.programs is not None:
            self.programs = ProgramCalls(
                setup.workload,
                clock=self.clock,
                make=partial(_call, setup),
                submit=self._submit,
            )
        self.cascades: CascadeCalls | None = None
        if setup.workload.cascades is not None:
            self.cascades = CascadeCalls(
                setup.workload,
                clock=self.clock,
                make=partial(_call, setup),
                submit=lambda request: self.plane.submit(request),
                cancel=lambda request: self.plane.cancel(request),
            )
        self._assembly = Assembly(
            clock=self.clock,
            fleet=self.fleet,
            journal=self.recorder,
            models=setup.models,
            classes=setup.workload.classes,
            policy=self.policy,
            ends=self.programs or self.cascades,
            gpus_max=setup.gpus_max,
            observer=self.recorder.observe,
            sleepers=self.fleet if setup.sleep.host_memory_gb > 0 else None,
        )
        self.plane = engines.listener = engines.samples = self._assembly.plane
        self.fleet.sleep_listener = self.plane
        self._scraper = ModelScraper(
            clock=self.clock,
            plane=self.plane,
            engines=lambda: engines.of(self.fleet.engines),
            period_s=setup.scrape_period_s,
            delay_s=setup.scrape_delay_s,
            dated_when_taken=setup.wire is not None,
            stages=self.plane if setup.stages else None,
        )

    def _submit(self, request: Request) -> None:
        if self._extends:
            request.extends, request.cuts = self._extends[request.id], self._cuts[request.id]
        self.plane.submit(request)

    def _composer(self, compose: ComposeHook, model: str) -> Composer:
        return compose(self.policy.settings, self.plane.models[model].learner)

    def run(self, progress: Progress | None = None) -> None:
        """Until the last request has ended, or the horizon."""
        setup, clock, plane = self.setup, self.clock, self.plane
        self._assembly.begin(setup.initial, attach=self.fleet.attach_running, loops=(self._scraper, self.fleet))
        end_s = self._end_s()
        submit, run_until = self._submit if self._extends else plane.submit, clock.run_until
        total = max(1, len(setup.workload))
        report_at = 0
        calls = self.programs or self.cascades
        for request in _requests(setup, None if calls is None else calls.waits):
            if request.arrival_s > end_s:
                break
            run_until(request.arrival_s)
            submit(request)
            if self.cascades is not None:
                self.cascades.asked(request)
            if request.id >= report_at:
                report_at = request.id + 1 + total // 200
                if progress is not None:
                    progress(min(1.0, self.recorder.ended_count / total))
        next_report_s = clock.now_s
        while plane.open_requests or (calls is not None and calls.coming):
            due_s = clock.next_s()
            if due_s is None or due_s > end_s:
                run_until(end_s)
                break
            clock.step()
            if progress is not None and clock.now_s > next_report_s:
                next_report_s = clock.now_s + 10.0
                progress(min(1.0, self.recorder.ended_count / total))
        self.fleet.close()
        if progress is not None:
            progress(1.0)

    def result(self, *, wall_s: float = 0.0, with_bound: bool = True) -> Result:
        setup, recorder, bill, workload = self.setup, self.recorder, self.fleet.bill, self.setup.workload
        table = recorder.table()
        points: tuple[ProgramPoint, ...] = ()
        lost: LostCalls | None = None
        if self.programs is not None:
            lost = self.programs.lost(table, setup.horizon_s)
            table, points = self.programs.table(table), self.programs.points(table)
        if self.cascades is not None:
            table = self.cascades.table(table)
        end_s = self.clock.now_s
        # The bounds know of no prefix that needs no prefill.
        bounded = with_bound and not setup.prefix_cache
        delivered, full = self._bounds(table, end_s) if bounded else (None, None)
        label = setup.label or setup.policy
        summary = summarise(
            policy=label,
            seed=setup.seed,
            classes=workload.classes,
            models=workload.models,
            requests=table,
            programs=points,
            lost=lost,
            gpu_seconds=sum(bill.gpu_seconds.values()),
            cost=sum(bill.cost.values()),
            gpus_peak=bill.gpus_peak,
            instances_peak=bill.instances_peak,
            plan_changes=recorder.plan_changes,
            reversal_window_s=REVERSAL_WINDOW_S,
            gpu_hours_bound=delivered.gpu_hours if delivered else 0.0,
            gpu_hours_bound_full=full.gpu_hours if full else 0.0,
            cost_bound=delivered.cost if delivered else 0.0,
            wall_s=wall_s,
            sim_s=end_s,
            evictions=self.plane.evictions,
            preemptions=sum(engine.preemptions for engine in self.engines),
            cold_starts=bill.cold_starts,
            warm_starts=bill.warm_starts,
            wakes=bill.wakes,
            sleeper_gb_seconds=bill.memory_gb_seconds,
        )
        return Result(
            policy=label,
            seed=setup.seed,
            scenario=setup.scenario,
            scenario_text=setup.scenario_text,
            settings=_settings(self.policy),
            models=workload.models,
            classes=workload.classes,
            summary=summary,
            requests=table,
            programs=points,
            fleet=tuple(recorder.fleet),
            batch_sizes=tuple(recorder.batch_sizes),
            decisions=tuple(recorder.decisions),
        )

    def _bounds(self, table: RequestTable, end_s: float) -> tuple[Bound, Bound]:
        return bound_of_run(self.setup, table, end_s), bound(self.setup)

    def _end_s(self) -> float:
        if isfinite(self.setup.horizon_s):
            return self.setup.horizon_s
        workload = self.setup.workload
        deadlines = workload.deadline_s[np.isfinite(workload.deadline_s)]
        last = max(float(workload.arrival_s[-1]), float(deadlines.max()) if len(deadlines) else 0.0)
        return last + self.setup.grace_s


def _requests(setup: Setup, waits: npt.NDArray[np.bool_] | None) -> Iterator[Request]:
    """The workload's rows as requests, made when they arrive; without those that wait for others (``waits``)."""
    workload = setup.workload
    models, classes, tenants = workload.models, workload.classes, workload.tenants
    for start in range(0, len(workload), _CHUNK):
        part = slice(start, start + _CHUNK)
        rows = zip(
            workload.arrival_s[part].tolist(),
            workload.input_tokens[part].tolist(),
            workload.output_tokens[part].tolist(),
            workload.model[part].tolist(),
            workload.cls[part].tolist(),
            workload.deadline_s[part].tolist(),
            strict=True,
        )
        for row, (arrival_s, tokens_in, tokens_out, model, cls, deadline_s) in enumerate(rows, start):
            if waits is not None and waits[row]:
                continue
            request = Request(row, models[model], classes[cls], arrival_s, tokens_in, tokens_out, deadline_s)
            request.pinned = request.interactive and setup.wire is not None
            request.tenant = tenants[workload.tenant[row] if workload.tenant is not None else 0]
            if workload.programs is not None:
                request.program = _program_of(workload, row)
            if workload.predicted_tokens is not None:
                request.predicted_tokens = int(workload.predicted_tokens[row])
            yield request


def _call(setup: Setup, row: int, now_s: float) -> Request:
    """A call of a program, or the second one of a cascade, that comes now."""
    workload = setup.workload
    request = Request(
        row,
        workload.models[int(workload.model[row])],
        workload.classes[int(workload.cls[row])],
        now_s,
        int(workload.input_tokens[row]),
        int(workload.output_tokens[row]),
    )
    request.pinned = request.interactive and setup.wire is not None
    request.tenant = workload.tenants[int(workload.tenant[row]) if workload.tenant is not None else 0]
    if workload.programs is not None:
        request.program = _program_of(workload, row)
    if workload.predicted_tokens is not None:
        request.predicted_tokens = int(workload.predicted_tokens[row])
    return request


def _program_of(workload: Workload, row: int) -> str:
    assert workload.programs is not None
    number = int(workload.programs.of[row])
    return "" if number < 0 else str(number)


def _settings(policy: Policy) -> dict[str, Any]:
    made: dict[str, Any] = asdict(policy.settings)
    if policy.stages_settings is not None:
        made["stages"] = asdict(policy.stages_settings)
    return made
