"""Simulations whose instances are pipelines of stages keep the laws, under every stage policy."""

from __future__ import annotations

import io
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from chiron.core.types import InstanceKind, ModelSpec, PipelineKind, StageKind
from chiron.engines.profile import Profile
from chiron.engines.stage_profiles import whole_profile
from chiron.fleet.model import Failures
from chiron.policies.rivals.scalers.static import StaticSettings
from chiron.policies.stages.petals import StagePetalsSettings
from chiron.policies.stages.registry import STAGE_POLICIES
from chiron.sim.run import Simulation, simulate
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result
from scenario_factory import PROFILE, TICK_S, setup_of

ROOMY = replace(PROFILE, kv_capacity_tokens=400, max_num_seqs=8, h_ms=8.0, f_ms_per_token=0.1, w0_ms=2.0)


def stage_of(number: int, profile: Profile, **changes: Any) -> StageKind:
    values: dict[str, Any] = {
        "name": f"s{number}",
        "layers": (number, number),
        "gpu": "g",
        "price_per_gpu_hour": 1.0,
        "weight_bytes": 1_000_000_000 * (number + 1),
        "kv_capacity_tokens": profile.kv_capacity_tokens,
        "max_num_seqs": profile.max_num_seqs,
        "max_replicas": 4,
        "start_s": 3.0,
        "step_times": tuple((n, profile.base_s(n)) for n in (1, 8, 32)),
        **changes,
    }
    return StageKind(**values)


def staged(setup: Setup, stages: list[Profile], stage_policy: str = "", **hops: Any) -> Setup:
    """The same setup on pipelines of these stages."""
    pipeline = PipelineKind(stages=tuple(stage_of(i, each) for i, each in enumerate(stages)), **hops)
    whole = whole_profile("pipe", stages, max_num_seqs=64, step_tokens=512)
    if len(stages) == 1:
        whole = replace(stages[0], name="pipe")
    kind = InstanceKind(
        name="pipe",
        gpu="g",
        gpus=len(stages),
        price_per_gpu_hour=1.0,
        kv_capacity_tokens=whole.kv_capacity_tokens,
        max_num_seqs=whole.max_num_seqs,
        max_num_batched_tokens=whole.max_num_batched_tokens,
        pipeline=pipeline,
    )
    spec = setup.models[0]
    model = ModelSpec(name=spec.name, kinds=(kind,), min_instances=spec.min_instances, max_instances=spec.max_instances)
    return replace(
        setup, models=(model,), profiles={"pipe": whole}, stages={"pipe": tuple(stages)}, stage_policy=stage_policy
    )


def rows(seed: int, count: int = 60) -> list[tuple[float, int, int, int, int]]:
    draw = Random(f"rows:{seed}")
    made = []
    for _ in range(count):
        at_s = draw.choice((draw.randrange(60 * 64) * TICK_S, draw.uniform(0, 60)))
        made.append((at_s, draw.randint(1, 80), draw.randint(1, 60), 0, draw.choice((0, 1, 1, 2))))
    return made


def log_of(setup: Setup, *, step_mode: bool = False) -> tuple[Result, str]:
    events = io.StringIO()
    return simulate(setup, step_mode=step_mode, events=events), events.getvalue()


def random_setup(seed: int, stage_policy: str, policy: str = "static") -> Setup:
    draw = Random(f"setup:{seed}")
    stages = [replace(ROOMY, h_ms=draw.choice((4.0, 1000 / 64, 20.0))) for _ in range(draw.randint(1, 3))]
    base = setup_of(rows(seed), policy=policy, profile=ROOMY, initial=draw.randint(1, 2), seed=seed)
    if draw.random() < 0.3:
        base = replace(base, failures=Failures(at=(17.0,)))
    elif draw.random() < 0.5:
        base = replace(base, failures=Failures(replica_mtbf_s=20.0, replicas_at=(12.5, 12.5, 30.0)))
    return staged(base, stages, stage_policy, hop_s=draw.choice((0.0, 0.002)), token_bytes=draw.choice((0, 8192)))


@pytest.mark.parametrize(
    ("stage_policy", "policy"),
    [
        ("", "static"),
        pytest.param("stage-hpa", "hpa-queue", marks=pytest.mark.slow),
        pytest.param("stage-balance", "chiron", marks=pytest.mark.slow),
        pytest.param("stage-petals", "static", marks=pytest.mark.slow),
    ],
)
def test_fast_forward_equals_step_mode_and_each_request_ends_once(stage_policy: str, policy: str) -> None:
    for seed in range(2):
        setup = random_setup(seed, stage_policy, policy)
        fast, log = log_of(setup)
        slow, again = log_of(setup, step_mode=True)
        assert log == again
        assert dict(fast.summary) | {"wall_s": 0} == dict(slow.summary) | {"wall_s": 0}
        outcomes = set(fast.requests.outcome.tolist())
        assert outcomes <= ({0, 2} if setup.failures.at else {0}), "finished, or failed with an instance"


def test_the_same_input_gives_the_same_log() -> None:
    setup = random_setup(7, "stage-balance")
    assert log_of(setup)[1] == log_of(setup)[1]


@pytest.mark.parametrize("policy", ["static", "chiron"])
def test_with_one_stage_the_whole_simulation_is_that_of_the_engine(policy: str) -> None:
    alone = setup_of(rows(3), policy=policy, profile=ROOMY, initial=2)
    assert log_of(staged(alone, [ROOMY]))[1] == log_of(alone)[1]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("stage_policy", list(STAGE_POLICIES))
def test_replicas_stay_within_bounds_and_no_run_beats_the_lower_bound(seed: int, stage_policy: str) -> None:
    setup = random_setup(seed, stage_policy)
    result, _ = log_of(setup)
    for decision in result.decisions:
        if decision.kind == "stage":
            assert 1 <= decision.after <= 4
            assert decision.reason
    assert result.summary["gpu_hours"] >= result.summary["gpu_hours_bound"] * (1 - 1e-9)


@pytest.mark.parametrize("stage_policy", list(STAGE_POLICIES))
def test_replicas_never_have_more_gpus_than_there_are(stage_policy: str) -> None:
    slow = replace(ROOMY, h_ms=40.0, f_ms_per_token=3.0)
    busy = [(t / 6, 20, 40, 0, 1) for t in range(600)]
    setup = staged(setup_of(busy, settings=StaticSettings(), initial=2), [ROOMY, slow], stage_policy)
    if stage_policy == "stage-petals":  # It has as many as it is told, whatever the load.
        setup = replace(setup, stage_settings=StagePetalsSettings(servers=8))
    peaks = {}
    for limit in (6, 60):
        simulation = Simulation(replace(setup, gpus_max={"g": limit}))
        simulation.run()
        peaks[limit] = simulation.fleet.bill.gpus_peak
    assert peaks[6] == 6 < peaks[60]


def test_the_bottleneck_gets_the_replicas_and_the_bill_is_that_of_the_replicas() -> None:
    quick = replace(ROOMY, kv_capacity_tokens=5000, max_num_seqs=64)
    slow = replace(quick, h_ms=40.0, f_ms_per_token=3.0)
    draw = Random("busy")
    busy = [(t / 6, draw.randint(5, 30), draw.randint(10, 60), 0, 1) for t in range(900)]
    for stage_policy in ("stage-hpa", "stage-balance"):  # Those that grow with the load.
        setup = staged(setup_of(busy, settings=StaticSettings()), [quick, slow, quick], stage_policy)
        simulation = Simulation(setup)
        simulation.run()
        result = simulation.result(wall_s=0.0)
        last = {d.subject: d.after for d in result.decisions if d.kind == "stage" and d.t_s < 170.0}
        # Until the first requests have ended, their length is a guess.
        assert last["m0#1/s1"] > 1, stage_policy
        assert {last.get(f"m0#1/s{i}", 1) for i in (0, 2)} == {1}, stage_policy
        assert simulation.fleet.bill.cold_starts + simulation.fleet.bill.warm_starts == sum(
            int(d.after - d.before) for d in result.decisions if d.kind == "stage" and d.after > d.before
        )
        assert simulation.fleet.bill.gpus == 0, "every bill is closed"
        assert simulation.fleet.bill.gpus_peak >= 4


@pytest.mark.parametrize("stage_policy", list(STAGE_POLICIES))
def test_a_replica_that_dies_costs_time_and_no_request(stage_policy: str) -> None:
    """Also the only one of its stage: what comes waits for the next one."""
    sound = staged(setup_of(rows(5), profile=ROOMY), [ROOMY, ROOMY], stage_policy)
    ended = {}
    for name, failures in (("none", Failures()), ("often", Failures(replica_mtbf_s=8.0, replicas_at=(1.0, 1.0)))):
        simulation = Simulation(replace(sound, failures=failures))
        simulation.run()
        result = simulation.result(wall_s=0.0)
        table = result.requests
        assert set(table.outcome.tolist()) == {0}
        assert table.output_tokens.sum() == sum(row[2] for row in rows(5))
        assert result.summary["gpu_hours"] >= result.summary["gpu_hours_bound"] * (1 - 1e-9)
        assert simulation.fleet.bill.gpus == 0, "every bill is closed"
        ended[name] = (
            float(table.finish_s.mean()),
            simulation.fleet.bill.cold_starts + simulation.fleet.bill.warm_starts,
        )
    assert ended["often"][0] > ended["none"][0]
    assert ended["often"][1] > ended["none"][1] + 2, "each is replaced"


def test_no_decision_about_stages_reads_the_future() -> None:
    """Later arrivals are left out: nothing changes before them."""
    setup = random_setup(11, "stage-balance")
    count = int((setup.workload.arrival_s < 30.0).sum())
    columns = ("arrival_s", "input_tokens", "output_tokens", "model", "cls", "deadline_s")
    workload = replace(setup.workload, **{name: getattr(setup.workload, name)[:count] for name in columns})
    whole, part = log_of(setup)[0], log_of(replace(setup, workload=workload))[0]

    def before(result: Result) -> list[Any]:
        return [d for d in result.decisions if d.t_s < 30.0]

    assert before(whole) == before(part)
