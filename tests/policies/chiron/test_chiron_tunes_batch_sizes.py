"""The local loop of ``chiron``: tables, and how fast a saturated instance settles."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isinf

import numpy as np
import pytest

from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.engines.profile_store import load_profile
from chiron.policies.chiron.local_loop import decide_batch_size, itl_target_s
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.views import StepTimes
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from chiron.workload.types import Workload
from policy_factory import CHAT, JOBS, local, mix

TIMES = StepTimes(
    fixed_s=0.01, per_sequence_s=1e-4, per_context_token_s=0.0, per_prefill_token_s=1e-4, per_prefill_square_s=0.0
)
CHAT_MIX = replace(mix(CHAT), input_tokens=1000.0, input_square=1e6, output_tokens=100.0)
OURS = ChironSettings(itl_margin=1.0)


def view(**changes: object):
    """w = 0.11 s over 100 tokens: each sequence adds 1.1 ms a step; SLO 0.12 s, so B* = 100."""
    given = {
        "step_times": TIMES,
        "mixes": {"chat": CHAT_MIX},
        "class_counts": {"chat": 64},
        "itl_slo_s": 0.12,
        "itl_s": 0.01 + 0.0011 * 60.0,
        "decode_batch": 60.0,
        "learned": True,
        "max_num_batched_tokens": 512,
    }
    return local(**(given | changes))


def test_it_jumps_to_the_batch_size_that_meets_the_slo() -> None:
    decision, _ = decide_batch_size(OURS, None, view())
    assert decision is not None
    assert decision.max_batch_size in (99, 100)
    assert decision.reason == "itl_below_slo"


def test_it_shrinks_at_once_when_above_the_slo() -> None:
    decision, _ = decide_batch_size(OURS, None, view(max_batch_size=300, dispatched=300))
    assert decision is not None
    assert decision.max_batch_size in (99, 100)
    assert decision.reason == "itl_above_slo"


def test_a_slower_engine_than_learned_is_corrected_for() -> None:
    state = None
    for _ in range(30):
        decision, state = decide_batch_size(OURS, state, view(itl_s=1.5 * (0.01 + 0.0011 * 60.0), max_batch_size=200))
    assert decision is not None
    assert decision.max_batch_size == pytest.approx((0.12 / 1.5 - 0.01) / 0.0011, abs=2)


def test_a_cap_that_holds_nothing_back_is_never_raised() -> None:
    decision, _ = decide_batch_size(OURS, None, view(at_cap=False, dispatched=20))
    assert decision is None


def test_nothing_is_decided_before_anything_is_learned_or_measured() -> None:
    assert decide_batch_size(OURS, None, view(learned=False))[0] is None
    decision, state = decide_batch_size(OURS, None, view(itl_s=float("nan"), decode_batch=0.0))
    assert state.correction == 1.0
    assert decision is not None, "the learned model alone is enough"


def test_an_instance_without_an_itl_slo_runs_as_much_as_it_can() -> None:
    decision, _ = decide_batch_size(OURS, None, view(itl_slo_s=inf))
    assert decision is not None
    assert decision.max_batch_size == 4096


def test_the_longest_step_is_bounded_only_where_the_token_budget_does_not() -> None:
    decision, _ = decide_batch_size(OURS, None, view(max_num_batched_tokens=512))
    assert decision is not None
    assert isinf(decision.prefill_limit_s), "0.01 + 60*1e-4 + 0.0512 is within 0.12"
    decision, _ = decide_batch_size(OURS, None, view(max_num_batched_tokens=8192))
    assert decision is not None
    assert decision.prefill_limit_s == pytest.approx(0.12 - 0.01 - 0.006)


def test_the_aim_is_lowered_while_requests_miss_their_itl() -> None:
    ours = ChironSettings()
    aims = [itl_target_s(ours, 0.1, missed, 0.012) for missed in (0.0, 0.003, 0.01, 0.05, 1.0)]
    assert aims == sorted(aims, reverse=True)
    assert aims[0] == aims[1] == pytest.approx(0.09)
    assert aims[-1] == pytest.approx(0.045)


@pytest.mark.parametrize(("slo_s", "aim_s"), [(0.1, 0.045), (0.028, 0.024), (0.02, 0.018)])
def test_the_aim_leaves_room_beside_what_every_step_takes_where_the_slo_does(slo_s: float, aim_s: float) -> None:
    """Or an instance whose SLO is near its shortest step would run next to nothing, and miss every TTFT."""
    assert itl_target_s(ChironSettings(), slo_s, 1.0, 0.012) == pytest.approx(aim_s)


def test_a_saturated_instance_settles_within_seconds() -> None:
    """The paper reports up to 150 s for an 8B model; a scrape a second and a learned model need a few."""
    profile = load_profile("llama-3.1-8b/a100/tp1")
    kind = InstanceKind(
        name="a100",
        gpu="A100",
        gpus=1,
        price_per_gpu_hour=2.0,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
    )
    chat = RequestClass(name="chat", kind="interactive", ttft_s=60.0, itl_s=0.1)
    count = 6000
    workload = Workload(
        arrival_s=np.arange(count) / 60.0,
        input_tokens=np.full(count, 200),
        output_tokens=np.full(count, 300),
        model=np.zeros(count, int),
        cls=np.zeros(count, int),
        deadline_s=np.full(count, inf),
        models=("m",),
        classes=(chat,),
    )
    setup = Setup(
        scenario="settle",
        models=(ModelSpec(name="m", kinds=(kind,), min_instances=1, max_instances=1),),
        profiles={"a100": profile},
        initial={"m": 1},
        workload=workload,
        policy="chiron",
        settings=ChironSettings(),
        horizon_s=90.0,
    )
    simulation = Simulation(setup)
    simulation.run()
    sizes = [(p.t_s, p.max_batch_size) for p in simulation.recorder.batch_sizes]
    final = sizes[-1][1]
    settled_s = next(t for t, size in sizes if all(abs(s - final) <= 0.2 * final for u, s in sizes if u >= t))
    assert settled_s < 40.0, "from a standing start: the instance first has to fill"
    view_itl = [p.itl_s for p in simulation.recorder.batch_sizes if p.t_s > settled_s and p.itl_s == p.itl_s]
    assert all(itl < 0.1 for itl in view_itl)


def test_while_batch_work_waits_the_prefill_in_flight_is_what_a_mean_over_tokens_bears() -> None:
    chat = replace(CHAT_MIX, cls=replace(CHAT, itl_s=0.12), output_low=16)
    how = {"max_num_batched_tokens": 8192, "batch_waits": True, "mixes": {"chat": chat}}
    limits = [
        decide_batch_size(OURS, None, view(**how, itl_missed=missed))[0] for missed in (0.0, 0.003, 0.0045, 0.009)
    ]
    steps = 0.12 - 0.01 - 0.006
    assert limits[0] is not None
    assert limits[0].prefill_limit_s == pytest.approx(16 * steps)
    assert limits[0].prefill_step_s == pytest.approx(steps)
    assert [round(limit.prefill_limit_s / limit.prefill_step_s) for limit in limits[:3] if limit] == [16, 8, 1]
    assert limits[3] is not None
    assert limits[3].prefill_step_s == pytest.approx(0.0), (
        "no batch prompt beside requests that miss their SLO too often"
    )
    alone, _ = decide_batch_size(OURS, None, view(**(how | {"batch_waits": False})))
    assert alone is not None
    assert alone.prefill_limit_s == pytest.approx(steps), "nobody gains from packing"


def test_running_batch_work_is_counted_by_its_decoding_and_new_batch_work_by_its_prefill_too() -> None:
    """Batch work of 0.105 s over 50 tokens, 0.1 s of it prefill; interactive work of 1.1 ms a step and request."""
    jobs = replace(mix(JOBS), input_tokens=1000.0, input_square=1e6, output_tokens=50.0)
    how = {
        "mixes": {"chat": CHAT_MIX, "jobs": jobs},
        "class_counts": {"chat": 10, "jobs": 200},
        "dispatched": 210,
        "max_num_batched_tokens": 8192,
        "itl_s": float("nan"),
        "max_batch_size": 64,
    }
    state = None
    for _ in range(40):
        decision, state = decide_batch_size(OURS, state, view(**how))
    assert decision is not None
    # 0.11 s are left of a step; the chats take 0.011 of it, 200 decoding jobs 0.02: room for 71 chats more.
    assert decision.max_batch_size == pytest.approx(210 + 71, abs=2)
    assert decision.batch_limit == pytest.approx(10 + 0.099 / 0.0021, abs=2)
