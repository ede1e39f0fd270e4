"""The bound of whole setups: no policy beats it in the simulator, its parts add up, and bad input is named."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf
from typing import Any

import numpy as np
import pytest

from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.engines.profile import Profile
from chiron.fleet.model import ColdStart, Failures
from chiron.sim.bound import BoundError, bound, bound_of_run
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.telemetry.run_data import RequestTable
from chiron.workload.types import Workload
from policy_names import ALL_CODE, QUICK, every

BIG = Profile(
    name="big",
    model="m",
    gpu="g",
    tp=2,
    engine="e",
    h_ms=9.0,
    w0_ms=3.0,
    f_ms_per_token=0.054,
    c_ms_per_context_token=8.5e-5,
    q_ms_per_token_squared=9e-7,
    kv_capacity_tokens=60_000,
    kv_bytes_per_token=131_072,
    max_num_seqs=128,
    price_per_gpu_hour=2.0,
)
SMALL = replace(BIG, name="small", gpu="s", tp=1, h_ms=12.0, f_ms_per_token=0.2, kv_capacity_tokens=20_000)
CLASSES = (
    RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.04),
    RequestClass(name="night", kind="batch", deadline_s=200.0),
)


def kind(profile: Profile) -> InstanceKind:
    return InstanceKind(
        name=profile.name,
        gpu=profile.gpu,
        gpus=profile.tp,
        price_per_gpu_hour=profile.price_per_gpu_hour,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
        max_instances=3,
    )


def setup(
    policy: str = "chiron",
    *,
    chats: int = 150,
    nights: int = 40,
    over_s: float = 60.0,
    kinds: tuple[Profile, ...] = (BIG,),
    minimum: int = 1,
    initial: int = 1,
    seed: int = 0,
    scale: float = 1.0,
) -> Setup:
    random = np.random.default_rng(seed)
    count = chats + nights
    arrival_s = np.concatenate([random.uniform(0, over_s, chats), np.zeros(nights)])
    cls = np.repeat([0, 1], [chats, nights])
    order = np.argsort(arrival_s, kind="stable")
    arrival_s, cls = arrival_s[order], cls[order]
    workload = Workload(
        arrival_s=arrival_s,
        input_tokens=np.maximum(1, random.lognormal(np.log(600 * scale), 0.8, count)).astype(np.int64),
        output_tokens=np.maximum(1, random.lognormal(np.log(100 * scale), 0.8, count)).astype(np.int64),
        model=np.zeros(count, dtype=np.int64),
        cls=cls.astype(np.int64),
        deadline_s=np.where(cls == 1, arrival_s + 200.0, inf),
        models=("m",),
        classes=CLASSES,
    )
    return Setup(
        scenario="test",
        models=(ModelSpec(name="m", kinds=tuple(map(kind, kinds)), min_instances=minimum, max_instances=6),),
        profiles={profile.name: profile for profile in kinds},
        initial={"m": initial},
        workload=workload,
        policy=policy,
        settings=None,
        seed=seed,
        grace_s=300.0,
    )


SCENARIOS = {
    "light": {"chats": 20, "nights": 0, "over_s": 120.0},
    "busy": {"chats": 1_200, "nights": 100},
    "overloaded": {"chats": 900, "nights": 300, "over_s": 20.0},
    "batch only": {"chats": 0, "nights": 250},
    "two kinds": {"chats": 600, "nights": 100, "kinds": (SMALL, BIG), "initial": 4},
    "long outputs": {"chats": 150, "nights": 50, "scale": 5.0},
    "no floor": {"chats": 60, "nights": 20, "minimum": 0},
    "high floor": {"chats": 60, "nights": 20, "minimum": 3, "initial": 3},
}


EVERY = ("no floor",)
"""Scenarios of every policy in the default suite."""


def pairs() -> list[Any]:
    """Every policy in every scenario, most of the rivals' in the slow suite."""
    return [
        pytest.param(policy, scenario, marks=[] if usual else [pytest.mark.slow])
        for policy in ALL_CODE
        for scenario in SCENARIOS
        for usual in [policy == "chiron" or (scenario in EVERY and policy in QUICK)]
    ]


@pytest.mark.parametrize(("policy", "scenario"), pairs())
def test_no_policy_beats_the_bound(policy: str, scenario: str) -> None:
    run = setup(policy, **SCENARIOS[scenario])  # type: ignore[arg-type]
    result = simulate(run, with_bound=False)
    least = bound_of_run(run, result.requests, result.summary["sim_s"])
    assert 0.0 < least.gpu_hours <= result.summary["gpu_hours"] * (1 + 1e-9)
    assert least.cost <= result.summary["cost"] * (1 + 1e-9)
    if result.summary["attainment_all"] == 1.0:
        assert bound(run).gpu_hours <= result.summary["gpu_hours"]


@pytest.mark.parametrize("policy", every())
def test_no_policy_beats_the_bound_when_instances_fail_and_requests_are_lost(policy: str) -> None:
    run = replace(setup(policy, chats=400), failures=Failures(mtbf_s=40.0, at=(5.0, 30.0), start_failure=0.3))
    result = simulate(run, with_bound=False)
    assert result.summary["finished"] < result.summary["requests"], "the case is one where some fail"
    least = bound_of_run(run, result.requests, result.summary["sim_s"])
    assert least.floor_gpu_hours == 0.0, "a failed instance is not paid for until another one loads"
    assert 0.0 < least.gpu_hours <= result.summary["gpu_hours"]


def test_no_policy_beats_the_bound_when_the_run_is_cut_short() -> None:
    run = replace(setup("static", chats=900, nights=300, over_s=20.0), horizon_s=25.0)
    result = simulate(run, with_bound=False)
    assert result.summary["unfinished"] > 0
    least = bound_of_run(run, result.requests, result.summary["sim_s"])
    assert 0.0 < least.gpu_hours <= result.summary["gpu_hours"]
    assert least.models[0].requests == result.summary["finished"]


def test_a_run_reports_its_bound() -> None:
    result = simulate(setup())
    least = bound_of_run(setup(), result.requests, result.summary["sim_s"])
    assert result.summary["gpu_hours_bound"] == least.gpu_hours
    assert result.summary["cost_bound"] == least.cost


def test_a_saturated_fleet_comes_close_to_its_bound() -> None:
    run = setup("static", chats=0, nights=1_500, initial=1)
    run = replace(run, cold_start=ColdStart(node_start_s=0.0))
    result = simulate(run, with_bound=False)
    least = bound_of_run(run, result.requests, result.summary["sim_s"])
    assert 0.85 < least.gpu_hours / result.summary["gpu_hours"] <= 1.0


def test_without_requests_the_floor_is_all() -> None:
    run = setup(minimum=2, initial=2)
    nothing = RequestTable(
        **{f.name: np.zeros(0, dtype=np.int64) for f in fields(RequestTable)}  # type: ignore[arg-type]
    )
    least = bound_of_run(run, nothing, 1800.0)
    assert least.gpu_hours == least.floor_gpu_hours == 2 * BIG.tp * 0.5
    assert least.cost == pytest.approx(2 * BIG.tp * 0.5 * 2.0)
    assert least.work_gpu_hours == 0.0


def test_the_floor_is_what_is_ready_at_the_start_and_never_less_than_allowed() -> None:
    def floor(**more: int) -> float:
        return bound(setup(**more)).floor_gpu_hours  # type: ignore[arg-type]

    assert floor(minimum=3, initial=3) == pytest.approx(3 * floor(minimum=1, initial=3))
    assert floor(minimum=3, initial=2) == pytest.approx(2 * floor(minimum=1, initial=3))
    assert floor(minimum=0, initial=3) == 0.0


def test_work_that_comes_in_one_burst_does_not_fit_into_the_floor_of_the_quiet_time() -> None:
    run = setup(chats=600, nights=0, over_s=5.0)
    late = replace(run.workload, arrival_s=np.append(run.workload.arrival_s[:-1], 3600.0))
    least = bound(replace(run, workload=late))
    part = least.models[0]
    assert part.work_gpu_hours < part.floor_gpu_hours < least.gpu_hours
    assert part.valleys_gpu_hours == pytest.approx(least.gpu_hours - part.floor_gpu_hours)
    patient = replace(late, cls=np.ones(len(late), dtype=np.int64), deadline_s=late.arrival_s + 7200.0)
    assert bound(replace(run, workload=patient)).gpu_hours == pytest.approx(part.floor_gpu_hours, rel=1e-3)


def test_models_add_up_and_each_is_bounded_by_its_own_kinds() -> None:
    one = setup()
    other = replace(one.models[0], name="other", kinds=(kind(SMALL),))
    both = replace(
        one,
        models=(*one.models, other),
        profiles={"big": BIG, "small": SMALL},
        initial={"m": 1, "other": 1},
        workload=replace(one.workload, models=("other", "m"), model=one.workload.model + 1),
    )
    least = bound(both)
    assert [part.model for part in least.models] == ["m", "other"]
    assert least.models[0].gpu_hours == bound(one).gpu_hours
    assert (least.models[0].requests, least.models[1].requests) == (190, 0)
    assert least.gpu_hours == sum(part.gpu_hours for part in least.models)


def test_another_kind_never_raises_the_work_and_a_dearer_one_changes_no_cost() -> None:
    alone = bound(setup(minimum=0))
    helped = bound(setup(minimum=0, kinds=(BIG, SMALL)))
    assert helped.work_gpu_hours <= alone.work_gpu_hours
    dear = replace(SMALL, price_per_gpu_hour=1e6)
    assert bound(setup(minimum=0, kinds=(BIG, dear))).cost == pytest.approx(alone.cost)
    free = bound(setup(minimum=0, kinds=(replace(BIG, price_per_gpu_hour=0.0),)))
    assert free.cost == 0.0
    assert free.gpu_hours == alone.gpu_hours


def test_tighter_latencies_never_lower_the_bound() -> None:
    def at(itl_s: float) -> float:
        run = setup(chats=400, nights=0, minimum=0)
        classes = (replace(CLASSES[0], itl_s=itl_s), CLASSES[1])
        return bound(replace(run, workload=replace(run.workload, classes=classes))).gpu_hours

    found = [at(itl_s) for itl_s in (inf, 0.2, 0.1, 0.05, 0.03, 0.02)]
    assert found == sorted(found)
    assert found[-1] > 1.2 * found[0]


def test_what_cannot_be_served_is_said() -> None:
    run = setup()
    long = run.workload.input_tokens.copy()
    long[:3] = 70_000
    classes = (replace(CLASSES[0], itl_s=0.001), CLASSES[1])
    least = bound(replace(run, workload=replace(run.workload, input_tokens=long, classes=classes)))
    assert any("3 requests are longer than the KV cache" in note for note in least.notes)
    assert any("cannot meet their ITL even alone" in note for note in least.notes)
    assert least.models[0].requests == 187


def test_requests_after_the_horizon_are_not_counted() -> None:
    run = setup(nights=0)
    cut = replace(run, horizon_s=30.0)
    assert bound(cut).models[0].requests == np.count_nonzero(run.workload.arrival_s < 30.0) < 150


def test_bad_input_is_named() -> None:
    run = setup()
    table = simulate(run, with_bound=False).requests
    with pytest.raises(BoundError, match="end_s is nan; it must be finite"):
        bound_of_run(run, table, float("nan"))
    with pytest.raises(BoundError, match="end_s is -1"):
        bound_of_run(run, table, -1.0)
    with pytest.raises(BoundError, match=r"model spans 4\.\.4; allowed is 0\.\.0"):
        bound_of_run(run, replace(table, model=table.model + 4), 100.0)
    with pytest.raises(BoundError, match="model 'x' is not served; models are m"):
        bound(replace(run, workload=replace(run.workload, models=("x",))))
    with pytest.raises(BoundError, match="instance kind 'big' has no profile; there are other"):
        bound(replace(run, profiles={"other": BIG}))
