"""What ``chiron explain`` reads: a saved result, or an event log."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite, nan
from pathlib import Path
from typing import Any

from chiron.cli.explain.moment import RunClock
from chiron.telemetry.event_log import read_event_log
from chiron.telemetry.format import counted
from chiron.telemetry.run_data import DecisionPoint, FleetPoint
from chiron.telemetry.store import load_result
from chiron.telemetry.verdict import seed_of

NO_FLEET = "No fleet is in it: a client, such as chiron load, sees none. A gateway's result.chiron has its decisions."


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHistory:
    """A run, as far as it is known."""

    title: str
    models: tuple[str, ...]
    decisions: tuple[DecisionPoint, ...]
    """Of the fleet, all models, in order of time."""
    ends_s: float
    note: str = ""
    """Why it has no fleet, if it has none."""
    damage: tuple[str, ...] = ()
    """Lines of an event log that are damaged and passed over, in words."""
    began: datetime | None = None
    """When the run began, if that is known: of a gateway's."""
    state: Callable[[str, float], Iterable[str]]
    """The fleet and the queue of a model at a moment, in lines."""

    @property
    def clock(self) -> RunClock:
        return RunClock(ends_s=self.ends_s, began=self.began)


def load_history(path: Path) -> RunHistory:
    """From a file that ``--save`` or ``--events`` wrote. Raises LogError, StoreError or OSError."""
    return _of_result(path) if zipfile.is_zipfile(path) else _of_log(path)


def _of_result(path: Path) -> RunHistory:
    result = load_result(path)
    began = None if result.began is None else datetime.fromisoformat(result.began)
    decisions = tuple(d for d in result.decisions if d.kind == "fleet")
    ends_s = max((t_s for t_s in (*(p.t_s for p in result.fleet[-1:]), *(d.t_s for d in decisions[-1:]))), default=0.0)
    clock = RunClock(ends_s=ends_s, began=began)

    def state(model: str, at_s: float) -> Iterable[str]:
        points = [point for point in result.fleet if point.model == model and point.t_s <= at_s]
        return _tell_point(points[-1], clock) if points else ()

    return RunHistory(
        title=f"{result.scenario}, policy {result.policy}{seed_of(result)}",
        models=result.models,
        decisions=decisions,
        note=NO_FLEET if result.summary["gpu_hours"] is None else "",
        ends_s=ends_s,
        began=began,
        state=state,
    )


def _tell_point(point: FleetPoint, clock: RunClock) -> Iterator[str]:
    yield (
        f"Fleet as decided upon at {clock.show(point.t_s)}: "
        f"{_roles(point.ready)}, {point.starting} starting, {point.draining} draining; "
        f"{counted(point.gpus, 'GPU')} billed, {counted(point.planned, 'instance')} planned."
    )
    yield (
        f"Work: {point.running_interactive:,} interactive and {point.running_batch:,} batch requests running, "
        f"{point.waiting_interactive:,} and {point.waiting_batch:,} waiting."
    )
    if isfinite(point.ibp):
        target = f" (target {point.ibp_target:.2f})" if isfinite(point.ibp_target) else ""
        yield f"Interactive backpressure (busy / interactive and mixed instances): {point.ibp:.2f}{target}."
    if isfinite(point.bbp):
        yield f"Batch backpressure (groups that would be late): {point.bbp:g}."
    for deadline_s, requests in point.groups:
        due = f"due at {clock.show(deadline_s)}" if isfinite(deadline_s) else "without a deadline"
        yield f"Queued batch group: {requests:,} requests {due}."


def _roles(ready: Mapping[str, int]) -> str:
    roles = ", ".join(f"{count} {role}" for role, count in ready.items() if count)
    return f"{sum(ready.values())} ready" + (f" ({roles})" if roles else "")


def _of_log(path: Path) -> RunHistory:
    damage: list[str] = []
    events = tuple(read_event_log(path, last_run=True, damaged=damage.append))
    models = dict.fromkeys(str(event["model"]) for event in events if "model" in event)

    def state(model: str, at_s: float) -> Iterable[str]:
        return _tell_events([event for event in events if event["t"] <= at_s], model)

    return RunHistory(
        title=f"event log {path.name}",
        models=tuple(models),
        decisions=tuple(_decision(event) for event in events if event.get("kind") == "fleet"),
        ends_s=events[-1]["t"] if events else 0.0,
        began=next((datetime.fromisoformat(event["run"]) for event in events if "run" in event), None),
        damage=tuple(damage),
        state=state,
    )


def _decision(event: Mapping[str, Any]) -> DecisionPoint:
    return DecisionPoint(
        t_s=event["t"],
        kind=event["kind"],
        subject=event["subject"],
        before=event["before"],
        after=event["after"],
        reason=event["reason"],
        numbers={name: nan if value is None else value for name, value in event["numbers"].items()},
    )


def _tell_events(events: Sequence[Mapping[str, Any]], model: str) -> Iterator[str]:
    """Replay: what instances and requests of the model were last heard of."""
    instances: dict[int, tuple[str, str]] = {}
    classes: dict[int | str, str] = {}
    last: dict[int | str, str] = {}
    for event in events:
        name = event["event"]
        if "request" in event:
            request, its = event["request"], event.get("model", model)
            if name == "arrival":  # Perhaps a cascade's second call, which has the name of the first.
                classes.pop(request, None)
                last.pop(request, None)
            if its == model and "class" in event and name != "ended":
                classes[request] = event["class"]
            if its == model and request in classes:
                last[request] = name
        elif event.get("model") == model:
            instances[event["instance"]] = (name, event["role"])
    states = Counter(state for state, _ in instances.values())
    ready = Counter(role for state, role in instances.values() if state == "ready")
    yield f"Fleet: {_roles(ready)}, {states['created']} starting, {states['draining']} draining."
    running = Counter(classes[request] for request, name in last.items() if name in ("dispatch", "first_token"))
    waiting = Counter(classes[request] for request, name in last.items() if name in ("arrival", "evicted"))
    yield f"Work: running {_counts(running)}; waiting {_counts(waiting)}."


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "none"
