"""Rivals that schedule on a fixed fleet start with ``fleet_factor`` times the initial one, as far as there is room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiron.core.types import ModelSpec
from chiron.policies.registry import POLICIES
from chiron.policies.rivals.scalers.static import initial_count
from chiron.policies.rivals.schedulers.niyama import NiyamaSettings
from chiron.policies.rivals.schedulers.ooco import OocoSettings
from scenario_factory import PROFILE, kind_of, run, setup_of, workload_of

ROWS = [(float(second), 10, 20, 0, 0) for second in range(40)]
FIXED = [name for name, entry in POLICIES.items() if hasattr(entry.settings, "fleet_factor") and "-tuned" not in name]


@pytest.mark.parametrize(
    ("factor", "count", "starts"), [(1.0, 7, 7), (1.1, 10, 11), (1.01, 10, 11), (0.5, 3, 2), (3.0, 0, 0)]
)
def test_the_initial_fleet_times_the_factor_is_rounded_up(factor: float, count: int, starts: int) -> None:
    assert initial_count(NiyamaSettings(fleet_factor=factor), count) == starts


def test_a_number_of_instances_goes_before_the_factor() -> None:
    assert initial_count(NiyamaSettings(fleet_factor=3.0, instances=5), 2) == 2  # And the first tick has 5.


@pytest.mark.parametrize("policy", FIXED)
def test_all_of_it_is_up_at_the_start_and_stays(policy: str) -> None:
    settings = POLICIES[policy].settings(fleet_factor=1.5)
    model = ModelSpec(name="m0", kinds=(kind_of(PROFILE),), min_instances=1, max_instances=8)
    result = run(setup_of(ROWS, policy=policy, settings=settings, model=model, initial=2)).result
    assert (result.summary["instances_peak"], result.summary["cold_starts"]) == (3, 0)


def test_it_ends_at_the_model_s_bound() -> None:
    settings = OocoSettings(fleet_factor=3.0)
    result = run(setup_of(ROWS, policy="ooco-like", settings=settings, initial=2)).result
    assert result.summary["instances_peak"] == 4


def test_models_that_share_gpus_have_their_own_first() -> None:
    """Five GPUs: two instances of either model, and one more of the first."""
    kind = kind_of(PROFILE)
    models = tuple(ModelSpec(name=name, kinds=(kind,), min_instances=1, max_instances=8) for name in ("m0", "m1"))
    setup = replace(
        setup_of(ROWS, policy="niyama", settings=NiyamaSettings(fleet_factor=2.0)),
        models=models,
        initial={"m0": 2, "m1": 2},
        gpus_max={kind.gpu: 5 * kind.gpus},
        workload=workload_of([*ROWS, (0.0, 10, 20, 1, 0)], ("m0", "m1")),
    )
    result = run(setup).result
    assert result.summary["instances_peak"] == 5
    assert result.summary["finished"] == 41
