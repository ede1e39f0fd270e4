"""A live run as a ``Result``: the simulator's report, ``chiron explain`` and data frames work on it.

Everything is bounded, so that a gateway can record for weeks: the newest requests and points are kept. GPU-seconds,
cost and peaks are those of the same stretch of time. No lower bound is computed: live, nobody knows output lengths in
advance, and the report shows a dash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from chiron.core.stages import PipelineSample
from chiron.core.types import Instance, ModelSpec, PipelineKind, Request, RequestClass
from chiron.gateway.reporting.tally import Noted
from chiron.policies.policy import Policy
from chiron.telemetry.recording import Timeline
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import OUTCOMES, RequestTable
from chiron.telemetry.summary import summarise

REVERSAL_WINDOW_S = 60.0
"""As in the simulator: a plan change against the previous one within this time is a reversal."""

_UNFINISHED = OUTCOMES.index("unfinished")
_EVICTIONS_MAX = 32767
_ROW = np.dtype(
    [
        ("model", "<i2"),
        ("cls", "<i2"),
        ("arrival_s", "<f8"),
        ("dispatch_s", "<f8"),
        ("first_token_s", "<f8"),
        ("finish_s", "<f8"),
        ("deadline_s", "<f8"),
        ("input_tokens", "<i8"),
        ("output_tokens", "<i8"),
        ("outcome", "i1"),
        ("evictions", "<i2"),
    ]
)

_TOGETHER = 4096
"""Rows that lie side by side."""

Row = tuple[int, int, float, float, float, float, float, int, int, int, int]
Rows: TypeAlias = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderSettings:
    """How much of a live run is remembered for its report."""

    rows_max: int = 2_000_000
    """Ended requests; beyond it the oldest are forgotten. 63 bytes each."""
    points_max: int = 100_000
    """Fleet points, batch sizes, decisions, plan changes and past instances, each; about 1 kB per point at most."""

    def __post_init__(self) -> None:
        for name in ("rows_max", "points_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"recorder: {name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """One instance's time in the fleet, with these GPUs: what it is billed for."""

    model: str
    gpus: int
    price_per_hour: float
    """Of all of them."""
    since_s: float
    until_s: float


class _Open(NamedTuple):
    """A stay that goes on."""

    instance: Instance
    since_s: float
    gpus: int
    price_per_hour: float


class Bill(NamedTuple):
    """What instances have taken."""

    gpu_seconds: float
    cost: float
    """In the currency of ``price_per_gpu_hour``."""


def prompt_tokens(request: Request) -> int:
    """As its engine counted them (``payload.prompt_tokens``), else as estimated when it came."""
    return getattr(request.payload, "prompt_tokens", 0) or request.input_tokens


class LiveRecorder:
    """Hears of requests and instances from the journal, and as ``StageSamples`` of the replicas of pipelines. Instances
    are billed from their creation to their end, pipelines by the replicas that they say they have."""

    open_requests: Callable[[], Iterable[Request]]
    """Those that have arrived and not ended, as the control plane knows them. To keep a list of them here, as they come
    and go, is to wait for memory twice a request."""
    settle: Callable[[], None]
    """Brings what has ended up to now; the journal's."""

    def __init__(
        self,
        *,
        models: Sequence[ModelSpec],
        classes: Sequence[RequestClass],
        settings: RecorderSettings | None = None,
        start_s: float = 0.0,
    ) -> None:
        self.settings = settings or RecorderSettings()
        self.timeline = Timeline(self.settings.points_max)
        self.forgotten = 0
        """Ended requests that gave way to newer ones."""
        self._models = tuple(m.name for m in models)
        self._classes = tuple(classes)
        self._model_index = {name: index for index, name in enumerate(self._models)}
        self._class_index = {c.name: index for index, c in enumerate(self._classes)}
        self._start_s = start_s
        self.open_requests = tuple
        self.settle = lambda: None
        self._rows: deque[Rows] = deque()
        """Some at a time, as they came."""
        self._count = 0
        self._alive: dict[int, _Open] = {}
        self._stays: deque[Stay] = deque(maxlen=self.settings.points_max)
        self._billed: dict[tuple[str, str], Bill] = {}
        """Of all instances that are gone."""
        self._preemptions = 0

    # -- what the journal reports ------------------------------------------------------------------------------

    def add(self, noted: Noted, of: Sequence[tuple[str, str]]) -> None:
        """Requests that have ended; ``of``: model and class of each place."""
        ended, ends = noted.ended, noted.ends
        if not len(ends):
            return
        rows = np.empty(len(ends), dtype=_ROW)
        rows["model"] = np.array([self._model_index[model] for model, _ in of])[ended["of"]]
        rows["cls"] = np.array([self._class_index[name] for _, name in of])[ended["of"]]
        for name in ("arrival_s", "dispatch_s", "first_token_s", "deadline_s"):
            rows[name] = (ended if name == "arrival_s" else ends)[name]
        rows["finish_s"], rows["outcome"] = ended["t"], ends["outcome"]
        rows["input_tokens"], rows["output_tokens"] = ended["tokens"], ends["tokens"]
        rows["evictions"] = np.minimum(ends["evictions"], _EVICTIONS_MAX)
        self._count += len(rows)
        if self._rows and len(self._rows[-1]) < _TOGETHER:
            rows = np.concatenate([self._rows.pop(), rows])
        self._rows.append(rows)
        self._forget(self._count - self.settings.rows_max)

    def _forget(self, more: int) -> None:
        """So many of the oldest."""
        while more > 0:
            rows = self._rows.popleft()
            gone, left = rows[:more], rows[more:]
            if len(left):
                self._rows.appendleft(left)
            self._start_s = max(self._start_s, float(gone["arrival_s"].max()))
            self.forgotten += len(gone)
            self._count -= len(gone)
            more -= len(gone)

    def instance_event(self, now_s: float, name: str, instance: Instance) -> None:
        """``created`` opens a bill, ``gone`` and ``failed`` close it."""
        self.timeline.instance_event(now_s, name, instance)
        if name == "created":
            self._alive[instance.id] = _opened(instance, now_s)
        elif name in ("gone", "failed") and instance.id in self._alive:
            self._close(self._alive.pop(instance.id), now_s)
            self._preemptions += instance.sample.preemptions if instance.sample else 0

    def stages_sampled(self, instance: Instance, sample: PipelineSample) -> None:
        """Told after the control plane, which drops what cannot be true."""
        now, pipeline = self._alive.get(instance.id), instance.kind.pipeline
        if now is None or pipeline is None or len(sample.stages) != len(pipeline.stages):
            return
        replicas = [stage.ready + stage.starting + stage.draining for stage in sample.stages]
        gpus, price = _of_replicas(pipeline, replicas)
        if gpus == instance.gpus and (gpus, price) != (now.gpus, now.price_per_hour):
            self._close(now, sample.taken_s)
            self._alive[instance.id] = _Open(instance, sample.taken_s, gpus, price)

    def _close(self, bill: _Open, now_s: float) -> None:
        self._stays.append(_stay(bill, now_s))
        _add_bill(self._billed, bill, now_s)

    # -- what it amounts to ------------------------------------------------------------------------------------

    def billed(self, now_s: float) -> dict[tuple[str, str], Bill]:
        """By model and type of GPU, since the start."""
        bills = dict(self._billed)
        for bill in self._alive.values():
            _add_bill(bills, bill, now_s)
        return bills

    def result(
        self,
        now_s: float,
        *,
        policy: Policy,
        label: str = "",
        scenario: str = "live",
        scenario_text: str = "",
        evictions: int = 0,
        began: str | None = None,
    ) -> Result:
        """The run so far; requests that have not ended are ``unfinished``. O(requests), so not for the hot path.

        ``label`` is what reports call the policy; ``scenario_text`` the configuration it ran with; ``began`` is
        the wall time at second 0.
        """
        table = self.table()
        start_s = self._start_s
        stays = [*self._stays, *(_stay(bill, now_s) for bill in self._alive.values())]
        gpu_seconds = sum(_seconds(stay, start_s) * stay.gpus for stay in stays)
        cost = sum(_seconds(stay, start_s) * stay.price_per_hour / 3600.0 for stay in stays)
        alive = [i.sample.preemptions for i, *_ in self._alive.values() if i.sample is not None]
        timeline = self.timeline
        name = label or policy.name
        summary = summarise(
            policy=name,
            seed=None,
            classes=self._classes,
            models=self._models,
            requests=table,
            gpu_seconds=gpu_seconds,
            cost=cost,
            gpus_peak=_peak([(stay, stay.gpus) for stay in stays], start_s),
            instances_peak=_peak([(stay, 1) for stay in stays], start_s),
            plan_changes=[change for change in timeline.plan_changes if change[0] >= start_s],
            reversal_window_s=REVERSAL_WINDOW_S,
            gpu_hours_bound=None,
            gpu_hours_bound_full=None,
            cost_bound=None,
            wall_s=now_s - start_s,
            sim_s=now_s - start_s,
            evictions=evictions,
            preemptions=self._preemptions + sum(alive),
            judged_at_s=now_s,
        )
        return Result(
            policy=name,
            seed=None,
            scenario=scenario,
            scenario_text=scenario_text,
            settings=asdict(policy.settings),
            models=self._models,
            classes=self._classes,
            summary=summary,
            requests=table,
            fleet=tuple(timeline.fleet),
            batch_sizes=tuple(timeline.batch_sizes),
            decisions=tuple(timeline.decisions),
            began=began,
        )

    def table(self) -> RequestTable:
        """Ended and open requests, in order of arrival."""
        self.settle()
        late = np.array([self._row(r) for r in self.open_requests()], dtype=_ROW)
        rows = np.concatenate([*self._rows, late])
        rows = rows[np.argsort(rows["arrival_s"], kind="stable")]
        return RequestTable(**{name: np.ascontiguousarray(rows[name]) for name in _ROW.names or ()})

    def _row(self, request: Request) -> Row:
        return (
            self._model_index[request.model],
            self._class_index[request.class_name],
            request.arrival_s,
            request.dispatch_s,
            request.first_token_s,
            request.finish_s,
            request.deadline_s,
            prompt_tokens(request),
            request.tokens_done,
            _UNFINISHED,
            min(request.evictions, _EVICTIONS_MAX),
        )


def _opened(instance: Instance, now_s: float) -> _Open:
    """As it begins: a pipeline with the least replicas."""
    kind = instance.kind
    if kind.pipeline is None:
        return _Open(instance, now_s, kind.gpus, kind.gpus * kind.price_per_gpu_hour)
    return _Open(instance, now_s, *_of_replicas(kind.pipeline, [s.min_replicas for s in kind.pipeline.stages]))


def _of_replicas(pipeline: PipelineKind, replicas: Sequence[int]) -> tuple[int, float]:
    """GPUs of so many replicas of each stage, and their price per hour."""
    gpus = [count * stage.gpus for count, stage in zip(replicas, pipeline.stages, strict=True)]
    return sum(gpus), sum(n * stage.price_per_gpu_hour for n, stage in zip(gpus, pipeline.stages, strict=True))


def _stay(bill: _Open, until_s: float) -> Stay:
    return Stay(
        model=bill.instance.model,
        gpus=bill.gpus,
        price_per_hour=bill.price_per_hour,
        since_s=bill.since_s,
        until_s=until_s,
    )


def _seconds(stay: Stay, start_s: float) -> float:
    """Of the stay, after ``start_s``."""
    return max(0.0, stay.until_s - max(stay.since_s, start_s))


def _peak(weighted: Sequence[tuple[Stay, int]], start_s: float) -> int:
    """The largest sum of weights at any moment after ``start_s``."""
    changes: list[tuple[float, int]] = []
    for stay, weight in weighted:
        if stay.until_s >= start_s:
            changes += [(max(stay.since_s, start_s), weight), (stay.until_s, -weight)]
    most = now = 0
    for _, change in sorted(changes):  # At one moment those that leave come first.
        now += change
        most = max(most, now)
    return most


def _add_bill(bills: dict[tuple[str, str], Bill], bill: _Open, until_s: float) -> None:
    named = bill.instance.model, bill.instance.kind.gpu
    before = bills.get(named, Bill(0.0, 0.0))
    seconds = max(0.0, until_s - bill.since_s)
    cost = seconds * bill.price_per_hour / 3600.0
    bills[named] = Bill(before.gpu_seconds + seconds * bill.gpus, before.cost + cost)
