"""What the demo of stages showed: which stage grew, when, what clients had of it, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chiron.telemetry.format import amount, known, milliseconds, percent
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import DecisionPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Surge:
    """In seconds of the traffic."""

    begin_s: float
    end_s: float


def found_bottleneck(client: Result, gateway: Result, *, slow: str, most: Mapping[str, int], surge: Surge) -> bool:
    """In the surge the slow stage had more replicas than any other one, on average."""
    begin_s = _began_s(client, gateway)
    times = begin_s + surge.begin_s, begin_s + surge.end_s
    had = {name: _replica_seconds(_steps(gateway), name, *times) for name in most}
    return all(had[slow] > seconds for name, seconds in had.items() if name != slow)


def policy_lines(
    policy: str, client: Result, gateway: Result, *, slow: str, most: Mapping[str, int], surge: Surge
) -> list[str]:
    """``most``: replicas that each stage may have, by its layers."""
    begin_s = _began_s(client, gateway)
    return [
        f"{policy}: {_replicas(gateway, slow, begin_s, surge)}",
        f"{policy}: {_latency(client, surge)}",
        f"{policy}: {_used(client, gateway, most, begin_s)}",
    ]


def _steps(gateway: Result) -> list[DecisionPoint]:
    return [each for each in gateway.decisions if each.kind == "stage" and each.before != each.after]


def _layers(decision: DecisionPoint) -> str:
    return decision.subject.rpartition("/")[2]


def _began_s(client: Result, gateway: Result) -> float:
    """The traffic's start by the gateway's clock: both saw the last request come."""
    return float(gateway.requests.arrival_s.max(initial=0.0) - client.requests.arrival_s.max(initial=0.0))


def _replicas(gateway: Result, slow: str, begin_s: float, surge: Surge) -> str:
    told = [_told(each, each.t_s - begin_s, surge) for each in _steps(gateway) if _layers(each) == slow]
    others = sorted({_layers(each) for each in _steps(gateway) if _layers(each) != slow and each.after > each.before})
    rest = f"of the others layers {', '.join(others)} grew" if others else "no other stage grew"
    return f"replicas of the slow stage {', '.join(told) or 'never changed'}; {rest}"


def _told(step: DecisionPoint, at_s: float, surge: Surge) -> str:
    if at_s < surge.begin_s:
        when = f"{surge.begin_s - at_s:.0f} s before the surge"
    elif at_s < surge.end_s:
        when = f"{at_s - surge.begin_s:.0f} s into the surge"
    else:
        when = f"{at_s - surge.end_s:.0f} s after it"
    return f"{step.before:g} → {step.after:g} {when}"


def _latency(client: Result, surge: Surge) -> str:
    table = client.requests
    third_s = (surge.end_s - surge.begin_s) / 3
    ttft_s, itl_s = table.ttft_s(), table.itl_s()
    parts = []
    for name, begin_s in (("first", surge.begin_s), ("last", surge.end_s - third_s)):
        mine = (table.arrival_s >= begin_s) & (table.arrival_s < begin_s + third_s)
        ttft, itl = (_median(values[mine]) for values in (ttft_s, itl_s))
        parts.append(f"of its {name} third TTFT p50 {known(amount, ttft)} s, ITL p50 {known(milliseconds, itl)} ms")
    done, attained = int((table.outcome == 0).sum()), client.settings["classes"]["chat"]["attainment"]
    cls = client.classes[0]
    return (
        f"{done:,} of {len(table.arrival_s):,} requests answered, {percent(attained)} within both SLOs "
        f"({cls.ttft_s:g} s, {cls.itl_s * 1000:g} ms); in the surge, {'; '.join(parts)}"
    )


def _median(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float | None:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else None


def _used(client: Result, gateway: Result, most: Mapping[str, int], begin_s: float) -> str:
    """Of planned replicas, from the traffic's start to its last answer."""
    end_s = begin_s + client.summary["sim_s"]
    used_s = sum(_replica_seconds(_steps(gateway), name, begin_s, end_s) for name in most)
    fixed_s = sum(most.values()) * (end_s - begin_s)
    return (
        f"{used_s:,.0f} replica-seconds, {percent(used_s / fixed_s)} of all stages at their most, "
        f"{sum(most.values())} replicas ({fixed_s:,.0f})"
    )


def _replica_seconds(steps: Sequence[DecisionPoint], layers: str, begin_s: float, end_s: float) -> float:
    mine = [each for each in steps if _layers(each) == layers]
    at_s, count, total_s = begin_s, mine[0].before if mine else 1.0, 0.0
    for step in mine:
        moment_s = min(max(step.t_s, begin_s), end_s)
        total_s += count * (moment_s - at_s)
        at_s, count = moment_s, step.after
    return total_s + count * (end_s - at_s)
