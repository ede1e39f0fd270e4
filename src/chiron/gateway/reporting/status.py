"""The state of a gateway as one JSON object: what ``GET /chiron/status`` answers and ``chiron top`` shows.

Pure over the objects given. Times are seconds; ``at`` fields are ISO 8601 in UTC; what is not known, or is infinite,
is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from chiron.control.snapshot import InstanceSnapshot, ModelSnapshot, PlaneSnapshot
from chiron.core.types import RequestClass
from chiron.fleet.port import FleetReport, KindReport
from chiron.fleet.starts import StartStatus
from chiron.gateway.relay.upstream import RETRIED
from chiron.gateway.reporting.cascades import CascadeTally
from chiron.gateway.reporting.event_writer import wall_time
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.tally import SLOT_S, ClassTally
from chiron.store.port import ENDED, Batch
from chiron.store.progress import eta_s, items_per_s
from chiron.telemetry.run_data import DecisionPoint

BATCHES_SHOWN = 50
"""Batches listed: those that run, earliest deadline first, then those that ended last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayReport:
    """One process that carries clients' connections."""

    pid: int
    connections: int
    files_open: int
    loop_lag_s: float
    open_requests: int
    late_messages: int
    """About placements that had ended already."""
    gateway: str = ""
    """Of several, as it says; empty: there is one, or the relay's version does not say."""
    protocol: int = 0
    """Version of the messages between it and the brain."""
    told: bool = True
    """All that it knew of a brain before this one is known here."""
    fallback_placements: int = 0
    """That it chose itself before it came to this brain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderReport:
    """The brain, where relays are processes of their own."""

    gateway: str
    """Which of several leads; empty: there is one."""
    address: str
    """Where the others' relays reach it; empty: nowhere."""
    term: int
    """Higher than those of the brains before it."""
    leads_s: float
    """For so long it has."""
    settling: bool
    """It waits for relays to tell what runs, and places nothing."""
    relays_missing: int
    """Relays that the brain before this one spoke with, or that there should be, and that have not told."""
    fallback_placements: int
    """That relays chose while they had no brain, as far as they have told."""
    expired_requests: int
    """That relays gave up because they had none for too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSources:
    """What the gateway knows and the control plane does not."""

    url: str = ""
    """Where clients reach the gateway."""
    version: str = ""
    policy: str = ""
    """As the config calls it, which may be a variant's name; empty: the policy's own."""
    advise: bool = False
    """Decisions are only told."""
    wall_origin_s: float = 0.0
    """Unix time at ``now_s == 0`` of the clock."""
    instance_urls: Mapping[int, str] = field(default_factory=dict)
    fleet: FleetReport = field(default_factory=FleetReport)
    gpus_max: Mapping[str, int] = field(default_factory=dict)
    """How many GPUs all models together may have, by type; those that are not named: any number."""
    batches: Sequence[Batch] = ()
    batch_in_flight: Mapping[str, int] = field(default_factory=dict)
    """Items leased from the store, by batch id."""
    outages: Mapping[str, str] = field(default_factory=dict)
    """Why nothing can serve a model, by name, for those of which that is so."""
    loop_lag_s: float = 0.0
    """The longest that the event loop was late in the last seconds."""
    connections: int = 0
    """Open client connections."""
    relays: Sequence[RelayReport] = ()
    relays_started: int = 0
    """Since the start, those included that were started again."""
    leader: LeaderReport | None = None
    """None: one process does all."""
    cascades: Mapping[tuple[str, str], CascadeTally] = field(default_factory=dict)
    """By cascade and class."""
    files_open: int = 0
    files_max: int = 0
    """File descriptors of the gateway's process, and how many it may have."""


def status(plane: PlaneSnapshot, journal: LiveJournal, around: StatusSources) -> dict[str, Any]:
    """The object. O(instances + queued batch groups)."""
    now_s = plane.now_s
    return {
        "at": wall_time(around.wall_origin_s + now_s),
        "now_s": now_s,
        "version": around.version,
        "url": around.url,
        "policy": around.policy or plane.policy,
        "advise": around.advise,
        "open_requests": plane.open_requests,
        "evictions": plane.evictions,
        "migrations": plane.migrations,
        "connections": around.connections,
        "files": {"open": around.files_open, "max": around.files_max},
        "leader": asdict(around.leader) if around.leader is not None else None,
        "relays": [asdict(relay) for relay in around.relays],
        "client_errors": client_errors(journal),
        "loop_lag_s": around.loop_lag_s,
        "event_log_dropped": journal.dropped_lines,
        "models": [_model(model, journal, around, now_s) for model in plane.models],
        "cascades": [_cascade(*key, tally) for key, tally in around.cascades.items()],
        "decisions": [
            _decision(point, around)
            for point in sorted((*journal.decisions, *journal.batch_sizes), key=lambda point: point.t_s)
        ],
        "batches": [_batch(batch, around, now_s) for batch in _shown(around.batches)],
    }


def client_errors(journal: LiveJournal) -> int:
    """Completions that were refused for what was wrong with them, here or by an engine."""
    return sum(count for status, count in journal.responses.items() if 400 <= status < 500 and status not in RETRIED)


def _model(model: ModelSnapshot, journal: LiveJournal, around: StatusSources, now_s: float) -> dict[str, Any]:
    spec, plan = model.spec, journal.plan_of(model.spec.name)
    queue = model.queue
    kinds = {kind.name: around.fleet.kinds.get(kind.name, KindReport()) for kind in spec.kinds}
    return {
        "name": spec.name,
        "min_instances": spec.min_instances,
        "max_instances": spec.max_instances,
        "ready": model.is_ready,
        "outage": around.outages.get(spec.name),
        "planned": dict(model.planned),
        "advised": dict(model.advised) or None,
        "reason": plan.reason if plan else None,
        "ibp": _number(plan.ibp) if plan else None,
        "ibp_target": _number(plan.ibp_target) if plan else None,
        "bbp": _number(plan.bbp) if plan else None,
        "cold_start_s": model.cold_start_s if model.cold_starts_seen else None,
        "instances": [_instance(instance, around) for instance in model.instances],
        "starts": [_start(name, kind.starts) for name, kind in kinds.items() if kind.starts is not None],
        "sleepers": [{"kind": name, **asdict(kind.sleep)} for name, kind in kinds.items() if kind.sleep is not None],
        "endpoints": [
            {"kind": name, "url": url, "state": health.state, "reason": health.reason}
            for name, kind in kinds.items()
            for url, health in kind.endpoints.items()
        ],
        "fleet_notes": [note for kind in kinds.values() for note in kind.notes],
        "queue": {
            "interactive": queue.interactive,
            "oldest_wait_s": _number(queue.oldest_wait_s),
            "batch": queue.batch,
            "batch_held": queue.batch_announced,
            "groups": [
                {"deadline_in_s": _number(group.deadline_s - now_s), "requests": group.requests}
                for group in queue.groups
            ],
        },
        "classes": [
            _class(model.classes[tally.cls.name], tally, model.running.get(tally.cls.name, 0), now_s)
            for tally in journal.tallies_of(spec.name)
        ],
    }


def _cascade(name: str, cls: str, tally: CascadeTally) -> dict[str, Any]:
    return {
        "name": name,
        "class": cls,
        "requests": tally.requests,
        "answered_first": tally.answered_first,
        "answered_then": tally.answered_then,
        "escalated": dict(tally.escalated),
        "escalated_share": tally.share,
        "ttft_met": tally.ttft_met,
        "ttft_missed": tally.ttft_missed,
    }


def _instance(instance: InstanceSnapshot, around: StatusSources) -> dict[str, Any]:
    usage, kind = around.fleet.usage.get(instance.id), instance.kind
    return {
        "id": instance.id,
        "kind": kind.name,
        "gpu": kind.gpu,
        "gpus": kind.gpus,
        "role": instance.role,
        "state": instance.state,
        "age_s": instance.age_s,
        "url": around.instance_urls.get(instance.id),
        "max_batch_size": instance.max_batch_size,
        "max_num_seqs": kind.max_num_seqs,
        "running_interactive": instance.running_interactive,
        "running_batch": instance.running_batch,
        "waiting": instance.waiting,
        "kv_used_tokens": instance.kv_used_tokens,
        "kv_capacity_tokens": instance.kv_capacity_tokens,
        "kv_usage": instance.kv_usage,
        "itl_s": _number(instance.itl_s),
        "itl_slo_s": _number(instance.itl_slo_s),
        "sample_age_s": _number(instance.sample_age_s),
        "cpu_share": usage.cpu_share if usage else None,
        "rss_bytes": usage.rss_bytes if usage else None,
        "pid": usage.pid if usage else None,
        "restarts": usage.restarts if usage else None,
    }


def _start(kind: str, starts: StartStatus) -> dict[str, Any]:
    return {
        "kind": kind,
        "state": starts.state,
        "failures": starts.failures,
        "failures_total": starts.failures_total,
        "next_start_in_s": starts.next_start_in_s,
        "reason": starts.reason,
    }


def _class(cls: RequestClass, tally: ClassTally, running: int, now_s: float) -> dict[str, Any]:
    """``cls``: as it is configured; a client may have set other SLOs."""
    ttft_p50, ttft_p99 = tally.ttft_recent.quantiles(now_s, (0.5, 0.99))
    itl_p50, itl_p99 = tally.itl_recent.quantiles(now_s, (0.5, 0.99))
    arrivals, ttft_max_s = tally.history(now_s)
    return {
        "name": cls.name,
        "kind": cls.kind,
        "ttft_slo_s": _number(cls.ttft_s),
        "itl_slo_s": _number(cls.itl_s),
        "deadline_s": _number(cls.deadline_s),
        "arrived": tally.arrived,
        **tally.outcomes,
        "running": running,
        "waiting": max(0, tally.arrived - tally.ended - running),
        "attained": tally.attained,
        "missed": tally.missed,
        "prompt_tokens": tally.prompt_tokens,
        "generation_tokens": tally.generation_tokens,
        "evictions": tally.evictions,
        "retries": tally.retries,
        "last_minute": {
            "ttft_p50_s": _number(ttft_p50),
            "ttft_p99_s": _number(ttft_p99),
            "itl_p50_s": _number(itl_p50),
            "itl_p99_s": _number(itl_p99),
        },
        "history": {"period_s": SLOT_S, "arrivals": arrivals, "ttft_max_s": ttft_max_s},
    }


def _decision(point: DecisionPoint, around: StatusSources) -> dict[str, Any]:
    return {
        "t_s": point.t_s,
        "at": wall_time(around.wall_origin_s + point.t_s),
        "kind": point.kind,
        "subject": point.subject,
        "before": point.before,
        "after": point.after,
        "reason": point.reason,
        "numbers": {name: _number(value) for name, value in point.numbers.items()},
    }


def _shown(batches: Sequence[Batch]) -> list[Batch]:
    open_ = sorted((b for b in batches if b.status not in ENDED), key=lambda b: (b.expires_s, b.created_s, b.id))
    ended = sorted((b for b in batches if b.status in ENDED), key=lambda b: (-b.created_s, b.id))
    return [*open_, *ended][:BATCHES_SHOWN]


def _batch(batch: Batch, around: StatusSources, now_s: float) -> dict[str, Any]:
    wall_s = around.wall_origin_s + now_s
    return {
        "id": batch.id,
        "model": batch.model,
        "status": batch.status,
        "total": batch.total,
        "completed": batch.completed,
        "failed": batch.failed,
        "running": around.batch_in_flight.get(batch.id, 0),
        "items_per_s": items_per_s(batch, wall_s),
        "eta_s": eta_s(batch, wall_s),
        "deadline_in_s": batch.expires_s - wall_s,
    }


def _number(value: float) -> float | None:
    """A finite number as it is; JSON has no others."""
    return float(value) if isfinite(value) else None
