"""Everything that one simulation needs, as values. ``config`` makes it from a scenario file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from chiron.core.types import ModelSpec
from chiron.engines.profile import Profile
from chiron.engines.remote import Wire
from chiron.fleet.model import ColdStart, Failures, Sleep
from chiron.workload.types import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run: one policy, one seed, one workload."""

    scenario: str
    scenario_text: str = ""
    models: tuple[ModelSpec, ...]
    profiles: Mapping[str, Profile]
    """Profile of each instance kind, by ``InstanceKind.name``."""
    stages: Mapping[str, tuple[Profile, ...]] = field(default_factory=dict)
    """Profiles of the stages of each kind that is a pipeline, likewise; ``profiles`` has their sums."""
    initial: Mapping[str, int]
    """Instances of each model that are ready at time 0, the same for every policy."""
    gpus_max: Mapping[str, int] = field(default_factory=dict)
    """GPUs of each type that exist; a type not named is unlimited."""
    workload: Workload
    history: Workload | None = None
    """What came before: the policy has lived through it, and what it learned is all that is left of it."""
    policy: str
    """Name in ``policies.registry.POLICIES``."""
    settings: Any
    """That policy's frozen settings dataclass."""
    stage_policy: str = ""
    """Name in ``STAGE_POLICIES`` (``policies.stages``) of what decides below it about stages; empty: nothing does."""
    stage_settings: Any = None
    label: str = ""
    """What results call it, so that one policy can run with several settings; empty: the policy's name."""
    seed: int = 0
    cold_start: ColdStart = field(default_factory=ColdStart)
    sleep: Sleep = field(default_factory=Sleep)
    failures: Failures = field(default_factory=Failures)
    scrape_period_s: float = 1.0
    scrape_delay_s: float = 0.2
    """Between an engine's state and the control plane's knowledge of it."""
    kv_transfer_gb_per_s: float = 20.0
    """Host link of an instance: saves and restores the KV of evicted requests."""
    prefix_cache: bool = False
    """Engines keep, in KV that nobody uses, what the next prompts of programs begin with."""
    wire: Wire | None = None
    """None: engines hear and are heard at once. Otherwise they are as a gateway has them (``engines.remote``): messages
    take time, what a client sees as it comes is not moved, an eviction is a connection that closes, and a scrape asks
    and is answered before ``scrape_delay_s`` begins."""
    horizon_s: float = inf
    """Stop here even if requests remain; else when the last one has ended."""
    grace_s: float = 7200.0
    """With an infinite horizon: stop this long after the last arrival or deadline, whatever still runs."""
