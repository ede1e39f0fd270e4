"""What comes at the very moment at which a timer of the control plane is due is at the same side of it in a replay."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from chiron.control.plane import ControlPlane
from chiron.core.types import Decision, Instance, ModelSpec, Request
from chiron.policies.registry import make_policy
from chiron.runtime.input_log import MarkedClock, Point, RecordedInputs, RecordedOutputs, described
from chiron.runtime.replay import replay
from scenario_factory import CLASSES, PROFILE, kind_of

SPEC = ModelSpec(name="m0", kinds=(kind_of(PROFILE),), min_instances=0, max_instances=2)


class Nothing:
    """Fleet, engine and journal that do nothing."""

    wants_events = True

    def create(self, instance: Instance) -> None:
        self.instance = instance

    def remove(self, instance: Instance) -> None: ...

    def start(self, request: Request) -> None: ...

    def evict(self, request: Request) -> None: ...

    def set_max_batch_size(self, max_batch_size: int) -> None: ...

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None: ...

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


@pytest.mark.parametrize("timer_first", [True, False])
def test_an_arrival_beside_a_timer(*, timer_first: bool) -> None:
    policy, point, nothing = make_policy("chiron", None), Point(), Nothing()
    lines: list[dict[str, Any]] = [{"t": 0.0, "event": "log", **described(policy, [SPEC], CLASSES, None)}]
    clock = MarkedClock(point)
    inputs = RecordedInputs(clock=clock, point=point, write=lambda line: lines.append(dict(line)))
    journal = RecordedOutputs(nothing, lambda line: lines.append(dict(line)))
    plane = inputs.plane = ControlPlane(
        clock=clock, fleet=nothing, journal=journal, models=[SPEC], classes=CLASSES, policy=policy
    )
    inputs.start()
    inputs.begin({"m0": 0}, attached=False)
    plane.request_initial("m0", 0)
    plane.begin()
    clock.run_until(1.0)

    inputs.submit(Request(1, "m0", CLASSES[0], 1.0, 8))  # An instance is asked for, by a timer of this moment.
    if timer_first:
        assert clock.step()
    inputs.submit(Request(2, "m0", CLASSES[0], 1.0, 8))
    clock.run_until(2.0)
    nothing.instance.began_s = 1.5
    inputs.instance_ready(nothing.instance, nothing)
    inputs.kinds_limited({PROFILE.name: 1})
    inputs.kinds_limited({})
    inputs.kinds_found({PROFILE.name: 1})
    inputs.instance_leaving(nothing.instance)

    names = [line.get("k", line["event"]) for line in lines]
    assert (names.index("created") < len(names) - 1 - names[::-1].index("arrival")) == timer_first
    done = replay([orjson.loads(orjson.dumps(line)) for line in lines])
    assert done.difference == ""
    assert done.placements == names.count("dispatch") > 0
    assert done.learned.models["m0"]["cold_start_s"] == plane.models["m0"].cold_start_s == 0.5
