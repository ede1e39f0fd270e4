"""Everything one simulation needs, as values. ``config`` makes it from a scenario file; so can you."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from chiron.core.types import ModelSpec
from chiron.engines.profile import Profile
from chiron.workload.types import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """How long an instance takes to come up. Billing starts with the model load."""

    node_start_s: float = 30.0
    """Until a node with free GPUs exists (0 on a fixed cluster). Not billed."""
    model_load_s: float = 30.0
    """Weights into the GPU and engine start, on a cold node. Billed. The paper's range is 15 s to 1 minute."""
    warm_load_s: float = 15.0
    """The same on a node that ran this model lately (weights still in its memory); no node start either. Billed."""
    warm_for_s: float = 600.0
    """How long a released node stays warm."""
    jitter: float = 0.1
    """Each start takes uniformly +- this fraction of its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Engine failures: at random, or at given times."""

    mtbf_s: float = inf
    """Mean time between failures of one instance, exponential; inf: never."""
    at: tuple[float, ...] = ()
    """Seconds at which one ready instance, drawn by seed, fails."""
    start_failure: float = 0.0
    """Probability that a start fails when its time is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run: one policy, one seed, one workload."""

    scenario: str
    scenario_text: str = ""
    models: tuple[ModelSpec, ...]
    profiles: Mapping[str, Profile]
    """Profile of each instance kind, by ``InstanceKind.name``."""
    initial: Mapping[str, int]
    """Instances of each model that are ready at time 0, the same for every policy."""
    gpus_max: Mapping[str, int] = field(default_factory=dict)
    """GPUs of each type that exist; a type not named is unlimited."""
    workload: Workload
    policy: str
    """Name in ``policies.registry.POLICIES``."""
    settings: Any
    """That policy's frozen settings dataclass."""
    label: str = ""
    """What results call it, so that one policy can run with several settings; empty: the policy's name."""
    seed: int = 0
    cold_start: ColdStart = ColdStart()
    failures: Failures = Failures()
    scrape_period_s: float = 1.0
    scrape_delay_s: float = 0.2
    """Between an engine's state and the control plane's knowledge of it."""
    kv_transfer_gb_per_s: float = 20.0
    """Host link of an instance: saves and restores the KV of evicted requests."""
    horizon_s: float = inf
    """Stop here even if requests remain; else when the last one has ended."""
    grace_s: float = 7200.0
    """With an infinite horizon: stop this long after the last arrival or deadline, whatever still runs."""
