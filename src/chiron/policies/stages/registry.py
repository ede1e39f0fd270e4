"""Every stage policy by name, and how one joins a policy for the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chiron.policies.policy import Policy, StagePolicyEntry
from chiron.policies.stages import balance, hpa, petals

STAGE_POLICIES: dict[str, StagePolicyEntry] = {
    "stage-hpa": StagePolicyEntry(
        settings=hpa.StageHpaSettings,
        decide=hpa.decide_stages,
        period_s=lambda settings: float(settings.sync_s),
        about="a Kubernetes HPA on each stage, on the time that it works or on what waits for it",
    ),
    "stage-balance": StagePolicyEntry(
        settings=balance.StageBalanceSettings,
        decide=balance.decide_stages,
        period_s=lambda settings: float(settings.tick_s),
        about="ours: the fewest replicas with which a queue model of the pipeline keeps TTFT and ITL, bottleneck first",
    ),
    "stage-petals": StagePolicyEntry(
        settings=petals.StagePetalsSettings,
        decide=petals.decide_stages,
        period_s=lambda settings: float(settings.tick_s),
        about="Petals: a fixed number of replicas, each at the layers where the pipeline is weakest",
        route=petals.route,
    ),
}


def with_stages(policy: Policy, name: str, settings: Any = None) -> Policy:
    """``policy`` for whole pipelines, with this stage policy below it (its defaults if ``settings`` is None). Raises
    KeyError with the names that exist."""
    entry = STAGE_POLICIES.get(name)
    if entry is None:
        raise KeyError(f"unknown stage policy {name!r}; there are: {', '.join(sorted(STAGE_POLICIES))}")
    settings = entry.settings() if settings is None else settings
    # A static max batch size is that of one engine; here each replica has its own.
    policy = replace(policy, initial_max_batch_size=None)
    return replace(
        policy,
        stages=entry.decide,
        route=entry.route,
        stages_settings=settings,
        stages_period_s=entry.period_s(settings),
    )
