"""A control plane whose fleet and engines do nothing, and whose inputs and outputs are lines of a log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from chiron.control.plane import ControlPlane
from chiron.core.types import Decision, Engine, Instance, ModelSpec, Request
from chiron.policies.policy import Policy
from chiron.policies.registry import make_policy
from chiron.runtime.input_log import MarkedClock, Point, RecordedInputs, RecordedOutputs, described
from chiron.runtime.replay import Replayed, replay
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

    def scale(self, replicas: Sequence[int]) -> None: ...

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None: ...

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


class Recorded:
    """Its log is ``lines``; ``ended`` hears of each end, ``instances`` are up at the start."""

    def __init__(
        self,
        ended: Callable[[Request], None] = lambda request: None,
        *,
        instances: int = 0,
        spec: ModelSpec = SPEC,
        policy: Policy | None = None,
    ) -> None:
        policy = policy or make_policy("chiron", None)
        point, self.nothing = Point(), Nothing()
        self.lines: list[dict[str, Any]] = [{"t": 0.0, "event": "log", **described(policy, [spec], CLASSES, None)}]
        self.hears = ended
        self.clock = MarkedClock(point)
        self.inputs = RecordedInputs(clock=self.clock, point=point, write=self.write)
        self.plane = self.inputs.plane = ControlPlane(
            clock=self.clock,
            fleet=self.nothing,
            journal=RecordedOutputs(self.nothing, self.write),
            ends=self,
            models=[spec],
            classes=CLASSES,
            policy=policy,
        )
        self.inputs.start()
        self.inputs.begin({"m0": instances}, attached=instances > 0)
        if instances:
            self.plane.adopt("m0", instances, self.attached)
        else:
            self.plane.request_initial("m0", 0)
        self.plane.begin()
        self.clock.run_until(1.0)

    def attached(self, instance: Instance) -> Engine:
        return self.nothing

    def ended(self, request: Request) -> None:
        self.hears(request)

    def write(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))

    def replayed(self) -> Replayed:
        return replay(orjson.loads(orjson.dumps(line)) for line in self.lines)
