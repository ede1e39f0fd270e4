"""What a gateway in advise mode would have done, beside what ran: read from its event log, in one pass.

Instances count while they are ready. Advice counts from the first decision of a run on; nothing is known of the time
before it, which is left out of both sides. Advice was not carried out, so this is an estimate: with fewer instances
each would have been busier, which a policy that sizes by load has in its plan, and one that sizes by queues has not.

Of a long run the oldest files are gone, and with them what became ready in that time. A file that begins in the middle
of a run says what stands then (``Standing``); where none does, the run is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from chiron.core.types import Decision, ModelSpec, RequestClass
from chiron.telemetry.errors import LogError


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Interactive requests by whether they met all of their SLOs."""

    met: int
    missed: int

    @property
    def share(self) -> float | None:
        return self.met / (self.met + self.missed) if self.met + self.missed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Of one model, over all runs in advise mode."""

    model: str
    seconds: float
    """That both sides are about."""
    ran_mean: float
    ran_most: int
    advised_mean: float
    advised_most: int
    short_s: float
    """More were advised than ran."""
    spare_s: float
    """Fewer were."""
    when_short: Judged
    """Requests that ended in that time."""
    otherwise: Judged
    price_per_hour: float
    """Of an instance, of the model's first kind; 0: the config names none."""
    changes: int
    """Of the advice."""
    reasons: Mapping[str, int]
    """Why, by the reason that is logged."""

    @property
    def saved(self) -> float | None:
        """Share of instance-hours; below 0: more were advised."""
        return 1.0 - self.advised_mean / self.ran_mean if self.ran_mean else None

    @property
    def saved_cost(self) -> float:
        return (self.ran_mean - self.advised_mean) * self.seconds / 3600.0 * self.price_per_hour


def log_facts(models: Iterable[ModelSpec], classes: Iterable[RequestClass], *, advise: bool) -> dict[str, Any]:
    """What the first line of each file of the log says, so that it can be read without the config."""
    slos = {each.name: _slos(each) for each in classes if each.interactive}
    return {
        "advise": advise,
        "models": {
            model.name: {
                "price_per_hour": model.kinds[0].price_per_gpu_hour * model.kinds[0].gpus,
                "classes": slos,
            }
            for model in models
        },
    }


class Standing:
    """What is ready and what is advised, for the first line of a file. ``now`` is replaced, never changed: another
    thread may be reading it."""

    def __init__(self) -> None:
        self.now: Mapping[str, Mapping[str, Any]] = {}
        """By model: ``ready``, ids of instances, and ``advised``, how many, or None: nothing yet."""

    def happened(self, name: str, model: str, instance: int) -> None:
        """An event of an instance."""
        ready = _READY.get(name)
        if ready is not None:
            others = [each for each in self._of(model)["ready"] if each != instance]
            self._put(model, ready=others + [instance] * ready)

    def decided(self, decision: Decision) -> None:
        if decision.kind == "fleet":
            self._put(decision.subject, advised=int(decision.after))

    def _put(self, model: str, **changed: Any) -> None:
        self.now = {**self.now, model: {**self._of(model), **changed}}

    def _of(self, model: str) -> Mapping[str, Any]:
        return self.now.get(model, {"ready": [], "advised": None})


_READY = {"ready": True, "gone": False, "failed": False}
"""Whether an instance is, after which event."""


def _slos(cls: RequestClass) -> dict[str, float]:
    """Those that it has."""
    slos = {"ttft_s": cls.ttft_s, "itl_s": cls.itl_s}
    return {name: value for name, value in slos.items() if value < inf}


def read_advice(events: Iterable[Mapping[str, Any]]) -> tuple[Advice, ...]:
    """By model, in order of the log. Raises LogError for a log that has none."""
    models: dict[str, _Model] = {}
    about: Mapping[str, Any] = {}
    runs, cut, run, last_s = 0, 0, None, 0.0
    for event in events:
        if event["event"] == "log":
            if event.get("run") != run:
                for each in models.values():
                    each.end(last_s)
                run, about = event.get("run"), event
                runs += about.get("advise") is True
                if about.get("advise") is True and event.get("at") != run:
                    last_s = float(event["t"])
                    if (standing := event.get("standing")) is None:
                        about, cut = {}, cut + 1
                        continue
                    for name in [each for each in about["models"] if each in standing]:
                        models.setdefault(name, _Model(name)).begin(last_s, standing[name], about["models"][name])
        elif about.get("advise") is True:
            last_s = float(event["t"])
            name = event.get("model") or (event.get("subject") if event.get("kind") == "fleet" else None)
            if isinstance(name, str) and name in about["models"]:
                facts = about["models"][name]
                models.setdefault(name, _Model(name)).hear(last_s, event, facts)
    for each in models.values():
        each.end(last_s)
    found = tuple(each.advice() for each in models.values() if each.seconds > 0.0)
    if not found:
        why = "it was not written by chiron serve --advise" if not runs else "nothing has been decided in it yet"
        if cut:
            why = "the files with which its runs began are gone, and the others do not say what was ready then"
        raise LogError(f"there is no advice in this log: {why}")
    return found


@dataclass(slots=True)
class _Model:
    """The sums so far."""

    name: str
    at_s: float = 0.0
    ready: set[int] = field(default_factory=set)
    advised: int | None = None
    seconds: float = 0.0
    ran_s: float = 0.0
    ran_most: int = 0
    advised_s: float = 0.0
    advised_most: int = 0
    short_s: float = 0.0
    spare_s: float = 0.0
    judged: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    """By whether instances were missing, and whether the SLOs were met."""
    price_per_hour: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def hear(self, now_s: float, event: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self._until(now_s)
        self.price_per_hour = facts["price_per_hour"]
        match event["event"]:
            case name if name in _READY:
                (self.ready.add if _READY[name] else self.ready.discard)(event["instance"])
            case "decision":
                self.advised = int(event["after"])
                # The first one may be that all is well as it is.
                self.reasons[str(event["reason"])] += event["before"] != event["after"]
            case "ended" if self.advised is not None:
                met = _met(event, facts["classes"].get(event["class"]))
                if met is not None:
                    self.judged[self.advised > len(self.ready), met] += 1

    def begin(self, now_s: float, stands: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """In the middle of a run."""
        self.at_s, self.ready, self.advised = now_s, set(stands["ready"]), stands["advised"]
        self.price_per_hour = facts["price_per_hour"]

    def end(self, now_s: float) -> None:
        """Of a run."""
        self._until(now_s)
        self.ready.clear()
        self.advised, self.at_s = None, 0.0

    def _until(self, now_s: float) -> None:
        passed_s, self.at_s = max(0.0, now_s - self.at_s), now_s
        if self.advised is None or not passed_s:
            return
        ran = len(self.ready)
        self.seconds += passed_s
        self.ran_s += passed_s * ran
        self.advised_s += passed_s * self.advised
        self.ran_most, self.advised_most = max(self.ran_most, ran), max(self.advised_most, self.advised)
        self.short_s += passed_s * (self.advised > ran)
        self.spare_s += passed_s * (self.advised < ran)

    def advice(self) -> Advice:
        return Advice(
            model=self.name,
            seconds=self.seconds,
            ran_mean=self.ran_s / self.seconds,
            ran_most=self.ran_most,
            advised_mean=self.advised_s / self.seconds,
            advised_most=self.advised_most,
            short_s=self.short_s,
            spare_s=self.spare_s,
            when_short=Judged(met=self.judged[True, True], missed=self.judged[True, False]),
            otherwise=Judged(met=self.judged[False, True], missed=self.judged[False, False]),
            price_per_hour=self.price_per_hour,
            changes=self.reasons.total(),
            reasons={why: count for why, count in self.reasons.most_common() if count},
        )


def _met(event: Mapping[str, Any], slos: Mapping[str, float] | None) -> bool | None:
    """None: the request counts on neither side. Batch work is due by the time of its job, which no line says."""
    if slos is None or event["outcome"] in ("rejected", "cancelled"):
        return None
    return event["outcome"] == "finished" and all((event.get(name) or 0.0) <= most for name, most in slos.items())
