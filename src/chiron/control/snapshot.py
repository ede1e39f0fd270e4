"""The state of the control plane as frozen values: all that status, metrics and pages read of it.

A snapshot is taken when somebody asks and shares nothing with the control plane, so it may be kept, compared, and sent
to another process. It costs O(instances + batch groups). Policies have views of their own (``model``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol

from chiron.control.model import ModelState, instance_view
from chiron.core.types import Instance, InstanceKind, ModelSpec, RequestClass, Role, StartSource, State
from chiron.policies.views import GroupView

GROUPS_MAX = 16
"""Queued batch groups in a snapshot of one model; later ones are merged into the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSnapshot:
    id: int
    model: str
    kind: InstanceKind
    role: Role
    state: State
    began_s: float
    """When its start began."""
    age_s: float
    """Since ready, or since created while starting."""
    max_batch_size: int
    running_interactive: int
    running_batch: int
    waiting: int
    """The next four as of its last scrape."""
    kv_used_tokens: int
    kv_usage: float
    """Share of the KV that was in use, 0..1; 0 before the first scrape."""
    itl_s: float
    """Mean step; nan when idle or unknown."""
    kv_capacity_tokens: int
    itl_slo_s: float
    """The tightest ITL that it is held to; inf without one."""
    sample_age_s: float
    """Age of its last scrape; inf before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSnapshot:
    """What waits for an instance of one model."""

    interactive: int
    oldest_wait_s: float
    """Since the first of those arrived; inf when none waits."""
    batch: int
    batch_announced: int
    """Batch requests that are still in a store."""
    groups: tuple[GroupView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSnapshot:
    spec: ModelSpec
    classes: Mapping[str, RequestClass]
    planned: Mapping[Role, int]
    advised: Mapping[Role, int]
    """The last plan that was reported and not carried out; empty where plans are carried out."""
    cold_start_s: float
    cold_starts_seen: int
    start_s: Mapping[StartSource, float]
    """What starts from each source took, where the fleet tells sources."""
    instances: tuple[InstanceSnapshot, ...]
    running: Mapping[str, int]
    """Requests dispatched and not ended, by class."""
    queue: QueueSnapshot

    @property
    def is_ready(self) -> bool:
        return any(instance.state == "ready" for instance in self.instances)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSnapshot:
    now_s: float
    policy: str
    open_requests: int
    """Arrived and not ended."""
    evictions: int
    migrations: int
    models: tuple[ModelSnapshot, ...]


class Readers(Protocol):
    """What readers see of the control plane."""

    def snapshot(self) -> PlaneSnapshot: ...

    def model_snapshot(self, model: str) -> ModelSnapshot: ...

    def is_served(self, model: str) -> bool:
        """An instance of it is ready."""

    def kv_capacity_tokens(self, model: str) -> int:
        """Of its largest instance."""


def model_snapshot(state: ModelState, now_s: float) -> ModelSnapshot:
    oldest_s = state.waiting.oldest_arrival_s()
    return ModelSnapshot(
        spec=state.spec,
        classes=dict(state.classes),
        planned=dict(state.planned),
        advised=dict(state.advised),
        cold_start_s=state.cold_start_s,
        cold_starts_seen=state.cold_starts_seen,
        start_s=dict(state.start_s),
        instances=tuple(_instance(state, instance, now_s) for instance in state.instances.values()),
        running=_running(state),
        queue=QueueSnapshot(
            interactive=len(state.waiting),
            oldest_wait_s=max(0.0, now_s - oldest_s) if (oldest_s := state.waiting.oldest_arrival_s()) < inf else inf,
            batch=state.batch.count,
            batch_announced=state.batch.announced,
            groups=state.batch.views(state.learner.expected_output, GROUPS_MAX),
        ),
    )


def _instance(state: ModelState, instance: Instance, now_s: float) -> InstanceSnapshot:
    view = instance_view(instance, now_s)
    return InstanceSnapshot(
        id=instance.id,
        model=instance.model,
        kind=instance.kind,
        role=instance.role,
        state=instance.state,
        began_s=instance.began_s,
        age_s=view.age_s,
        max_batch_size=instance.max_batch_size,
        running_interactive=instance.running_interactive,
        running_batch=len(instance.batch),
        waiting=view.waiting,
        kv_used_tokens=view.kv_used_tokens,
        kv_usage=min(1.0, view.kv_used_tokens / instance.kv_capacity_tokens),
        itl_s=view.itl_s,
        kv_capacity_tokens=view.kv_capacity_tokens,
        itl_slo_s=_itl_slo_s(state, instance),
        sample_age_s=view.sample_age_s,
    )


def _itl_slo_s(state: ModelState, instance: Instance) -> float:
    """As the local loop sees it."""
    classes = state.classes
    held = [classes[name].itl_s for name, count in instance.class_counts.items() if count > 0]
    if instance.role != "batch":
        held += [classes[name].itl_s for name in state.learner.seen_names() if classes[name].interactive]
    return min(held, default=inf)


def _running(state: ModelState) -> dict[str, int]:
    running: dict[str, int] = {}
    for instance in state.instances.values():
        for name, count in instance.class_counts.items():
            running[name] = running.get(name, 0) + count
    return running
