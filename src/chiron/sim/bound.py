"""A lower bound on GPU-hours and cost that no policy can beat.

What a clairvoyant scheduler would need on the same profiles with no cold start, instances that come and go for free
at any instant, and perfect packing: for every model the least work of its requests (``bound_work``), and the fleet
that is paid for anyway (``min_instances``), which absorbs work only while that may be done (``bound_time``)::

    bound = floor + work - (work that fits into the floor within its windows)

``docs/bound.md`` has the proof, what is left out, and how tight it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.sim.bound_step import Demand, Floats, Mask, Supply, supply_of
from chiron.sim.bound_time import absorbed
from chiron.sim.bound_work import Prices, best_prices, least_work, with_feasible_itl
from chiron.sim.setup import Setup
from chiron.telemetry.run_data import RequestTable

Ints = npt.NDArray[np.integer[Any]]


class BoundError(ValueError):
    """The setup, or the table of requests, cannot be bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBound:
    """One model's part of a bound. GPU-hours are at least max(work, floor)."""

    model: str
    requests: int
    """Requests that are counted."""
    gpu_hours: float
    cost: float
    work_gpu_hours: float
    """What the requests are charged, packed perfectly."""
    floor_gpu_hours: float
    """The smallest fleet allowed, for as long as the run lasts."""
    notes: tuple[str, ...]

    @property
    def valleys_gpu_hours(self) -> float:
        """What the floor adds when work is too little or may not be done then: above max(work, floor)."""
        return self.gpu_hours - max(self.work_gpu_hours, self.floor_gpu_hours)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """GPU-hours and cost that no policy can beat, and what they are made of."""

    gpu_hours: float
    cost: float
    """In the currency of ``price_per_gpu_hour``."""
    work_gpu_hours: float
    floor_gpu_hours: float
    models: tuple[ModelBound, ...]
    notes: tuple[str, ...]
    """In words: what shares the fixed part of a step, what was left out."""


def bound(setup: Setup) -> Bound:
    """Every request that arrives before the horizon finishes and attains its SLO. Of programs: every call finishes by
    the horizon, within its ITL."""
    work = setup.workload
    counted = work.arrival_s < setup.horizon_s
    end_s = min(setup.horizon_s, float(work.arrival_s.max(initial=0.0)))
    required = np.ones(len(work), dtype=np.bool_)
    due_s, itl_s = _limits(work.arrival_s, work.output_tokens, work.cls, work.deadline_s, work.classes, required)
    arrival_s = work.arrival_s
    if work.programs is not None:
        # When a call comes is the policy's doing. It cannot come sooner than this, and may be late.
        arrival_s = work.programs.earliest_s
        due_s = np.where(work.programs.of >= 0, inf, due_s)
        counted = arrival_s < setup.horizon_s
        end_s = min(setup.horizon_s, float(arrival_s.max(initial=0.0)))
    if work.cascades is not None:  # Of a call that is followed by another its client sees nothing; both may be late.
        arrival_s = work.cascades.start_s
        due_s = np.where((work.cascades.then >= 0) | work.cascades.waits, inf, due_s)
        waited = work.cascades.waited_tokens(work.output_tokens)
        itl_s = np.where(work.cascades.then >= 0, inf, _engine_itl(waited, work.output_tokens, itl_s))
        counted = arrival_s < setup.horizon_s
        end_s = min(setup.horizon_s, float(arrival_s.max(initial=0.0)))
    columns = (arrival_s, np.minimum(due_s, setup.horizon_s), work.input_tokens, work.output_tokens, itl_s)
    return _bound(setup, counted, work.model, columns, end_s)


def bound_of_run(setup: Setup, requests: RequestTable, end_s: float) -> Bound:
    """What a run from 0 to ``end_s`` (seconds) delivered: attained requests within their SLO, others that finished
    at some time before the end. What did not finish counts nothing. ``requests.model`` and ``requests.cls`` index the
    models and classes of the setup's workload; with cascades, a row is one of its ``Cascades.answers``."""
    if not (isfinite(end_s) and end_s >= 0.0):
        raise BoundError(f"end_s is {end_s}; it must be finite and at least 0 seconds")
    classes = setup.workload.classes
    due_s, itl_s = _limits(
        requests.arrival_s,
        requests.output_tokens,
        requests.cls,
        requests.deadline_s,
        classes,
        requests.attained(classes),
    )
    cascades = setup.workload.cascades
    if cascades is not None:
        waited = cascades.waited_tokens(setup.workload.output_tokens)[cascades.answers]
        itl_s = _engine_itl(waited, requests.output_tokens, itl_s)
    columns = (requests.arrival_s, np.minimum(due_s, end_s), requests.input_tokens, requests.output_tokens, itl_s)
    return _bound(setup, requests.outcome == 0, requests.model, columns, end_s)


def _limits(
    arrival_s: Floats,
    output_tokens: Ints,
    cls: Ints,
    deadline_s: Floats,
    classes: Sequence[RequestClass],
    required: Mask,
) -> tuple[Floats, Floats]:
    """Due times and ITLs that have to be met; inf where not required."""
    ttft_s = np.array([c.ttft_s for c in classes], dtype=np.float64)[cls]
    itl_s = np.array([c.itl_s for c in classes], dtype=np.float64)[cls]
    gaps = output_tokens - 1
    decode_s = np.multiply(gaps, itl_s, where=gaps > 0, out=np.zeros(len(gaps)))
    due_s = np.minimum(arrival_s + ttft_s + decode_s, deadline_s)
    return np.where(required, due_s, inf), np.where(required, itl_s, inf)


def _engine_itl(waited: Ints, output_tokens: Ints, itl_s: Floats) -> Floats:
    """Mean ITLs that engines must keep for clients to see these. A client that begins to read after ``waited`` gaps
    sees only the rest of the answer's time, over all of its gaps."""
    gaps = output_tokens - 1
    seen = np.maximum(gaps - waited, 0)
    factor = np.divide(gaps, seen, where=seen > 0, out=np.full(len(gaps), inf))
    return np.where(waited > 0, itl_s * factor, itl_s)


def _bound(
    setup: Setup,
    counted: Mask,
    model: Ints,
    columns: tuple[Floats, Floats, Ints, Ints, Floats],
    end_s: float,
) -> Bound:
    if len(model) and not 0 <= int(model.min()) <= int(model.max()) < len(setup.workload.models):
        raise BoundError(
            f"requests: model spans {model.min()}..{model.max()}; allowed is 0..{len(setup.workload.models) - 1}"
        )
    specs = {spec.name: spec for spec in setup.models}
    unknown = [name for name in setup.workload.models if name not in specs]
    if unknown:
        raise BoundError(f"workload: model {unknown[0]!r} is not served; models are {', '.join(specs)}")
    arrival_s, due_s, inputs, outputs, itl_s = columns
    parts = []
    for spec in setup.models:
        index = setup.workload.models.index(spec.name) if spec.name in setup.workload.models else -1
        mine = counted & (model == index)
        demand = Demand(
            arrival_s=arrival_s[mine],
            due_s=due_s[mine],
            input_tokens=inputs[mine].astype(np.float64),
            output_tokens=outputs[mine].astype(np.float64),
            itl_s=itl_s[mine],
        )
        parts.append(_model_bound(setup, spec, demand, end_s))
    return Bound(
        gpu_hours=sum(part.gpu_hours for part in parts),
        cost=sum(part.cost for part in parts),
        work_gpu_hours=sum(part.work_gpu_hours for part in parts),
        floor_gpu_hours=sum(part.floor_gpu_hours for part in parts),
        models=tuple(parts),
        notes=tuple(f"{part.model}: {note}" for part in parts for note in part.notes),
    )


def _model_bound(setup: Setup, spec: ModelSpec, demand: Demand, end_s: float) -> ModelBound:
    supplies = _supplies(setup, spec)
    fits = demand.input_tokens + demand.output_tokens <= max(supply.kv_tokens for supply in supplies)
    demand = demand.take(fits)
    held = np.isfinite(demand.itl_s)
    demand = with_feasible_itl(demand, supplies)
    hopeless = int(np.count_nonzero(held & ~np.isfinite(demand.itl_s)))
    kinds = [best_prices(demand, supply) for supply in supplies] if len(demand) else []
    instances = floor_instances(setup, spec)

    def total(weights: list[float]) -> tuple[float, float, float]:
        work = least_work(kinds, weights, demand) if kinds else np.zeros(0)
        rate = instances * min(weights)
        floor, needed = rate * end_s, float(work.sum())
        free = absorbed(demand.arrival_s, demand.due_s, work, rate=rate, end_s=end_s)
        return floor + needed - free, needed, floor

    gpu_s, work_s, floor_s = total([float(supply.gpus) for supply in supplies])
    cost, _, _ = total([supply.gpus * supply.price_per_gpu_hour / 3600.0 for supply in supplies])
    return ModelBound(
        model=spec.name,
        requests=len(demand),
        gpu_hours=gpu_s / 3600.0,
        cost=cost,
        work_gpu_hours=work_s / 3600.0,
        floor_gpu_hours=floor_s / 3600.0,
        notes=_notes(kinds, int(np.count_nonzero(~fits)), hopeless),
    )


def floor_instances(setup: Setup, spec: ModelSpec) -> int:
    """Instances that are ready, so paid for, at every moment whatever a policy decides; 0 if they may fail."""
    failures = setup.failures
    if failures.at or isfinite(failures.mtbf_s) or failures.start_failure > 0.0:
        return 0
    return min(spec.min_instances, setup.initial.get(spec.name, spec.min_instances))


def _supplies(setup: Setup, spec: ModelSpec) -> list[Supply]:
    missing = [kind.name for kind in spec.kinds if kind.name not in setup.profiles]
    if missing:
        raise BoundError(
            f"model {spec.name!r}: instance kind {missing[0]!r} has no profile; there are {', '.join(setup.profiles)}"
        )
    return [supply_of(setup.profiles[kind.name], _by_pass(kind)) for kind in spec.kinds]


def _by_pass(kind: InstanceKind) -> InstanceKind:
    """Of a pipeline, one micro-batch's way through all stages: it is on one replica at a time, so each second of it is
    paid for by no fewer GPUs than those of the smallest replica, at no less than the lowest price."""
    if kind.pipeline is None:
        return kind
    stages = kind.pipeline.stages
    return replace(
        kind,
        gpus=min(stage.gpus for stage in stages),
        price_per_gpu_hour=min(stage.price_per_gpu_hour for stage in stages),
    )


_SHARED_BY = {
    "kv": "by KV space",
    "slots": "by running sequences",
    "tokens": "by tokens of a step",
    "density": "by requests that can be in flight together",
    "itl": "by step duration, which the ITL limits",
}


def _notes(kinds: Sequence[Prices], too_long: int, hopeless: int) -> tuple[str, ...]:
    notes = [
        f"{kind.supply.name}: a step is at least {kind.tangent.alpha_s * 1000:.3g} ms, "
        f"shared {_SHARED_BY[kind.sharing]}, plus {kind.tangent.beta_s * 1e6:.3g} µs a token"
        for kind in kinds
    ]
    if too_long:
        notes.append(f"{too_long} requests are longer than the KV cache of every kind and are left out")
    if hopeless:
        notes.append(f"{hopeless} requests cannot meet their ITL even alone; only their work is counted")
    return tuple(notes)
