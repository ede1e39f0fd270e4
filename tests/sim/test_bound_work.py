"""The work part of the lower bound: cases that can be computed by hand, and how it moves."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, InstanceKind, Request, RequestClass
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.sim.bound_step import ROUNDING_S, Demand, Sharing, Tangent, sharings, supply_of, tangents
from chiron.sim.bound_work import best_prices, least_work, prices, request_work_s, with_feasible_itl

LINEAR = Profile(
    name="linear",
    model="m",
    gpu="g",
    tp=1,
    engine="e",
    h_ms=10.0,
    w0_ms=0.0,
    f_ms_per_token=0.1,
    c_ms_per_context_token=0.01,
    q_ms_per_token_squared=0.0001,
    kv_capacity_tokens=100_000,
    kv_bytes_per_token=1,
    max_num_seqs=8,
    max_num_batched_tokens=1_000,
)
KNEE = replace(LINEAR, name="knee", h_ms=5.0, w0_ms=5.0)


def close(value: float) -> object:
    """Rounding in the engine model costs the bound ROUNDING_S of a step: 5e-5 of 10 ms."""
    return pytest.approx(value, rel=1e-4)


def demand(
    inputs: list[int],
    outputs: list[int],
    *,
    itl_s: float = inf,
    arrival_s: list[float] | None = None,
    due_s: list[float] | None = None,
) -> Demand:
    count = len(inputs)
    return Demand(
        arrival_s=np.array(arrival_s or [0.0] * count),
        due_s=np.array(due_s or [inf] * count),
        input_tokens=np.array(inputs, dtype=np.float64),
        output_tokens=np.array(outputs, dtype=np.float64),
        itl_s=np.full(count, itl_s),
    )


def busy_s(profile: Profile, inputs: list[int], outputs: list[int]) -> float:
    """Seconds that the simulator's engine is busy with these requests, all there from the start."""

    class Silent:
        def first_token(self, request: Request) -> None: ...
        def finished(self, request: Request) -> None: ...
        def evicted(self, request: Request) -> None: ...
        def refused(self, request: Request, reason: str) -> None:
            raise AssertionError(reason)

    clock = VirtualClock()
    kind = InstanceKind(
        name="k",
        gpu="g",
        gpus=1,
        price_per_gpu_hour=1.0,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
    )
    instance = Instance(0, "m", kind, "mixed", 0.0)
    engine = EngineModel(clock=clock, instance=instance, profile=profile, times=StepTable(profile), listener=Silent())
    batch = RequestClass(name="b", kind="batch")
    for row, (prompt, length) in enumerate(zip(inputs, outputs, strict=True)):
        request = Request(row, "m", batch, 0.0, prompt, length)
        clock.call_at(0.0, lambda request=request: engine.start(request))
    while clock.step():
        pass
    return engine.busy_s


@pytest.mark.parametrize("profile", [LINEAR, KNEE])
def test_the_tangents_lie_below_the_step_time_and_touch_it(profile: Profile) -> None:
    sizes = np.arange(0, 3_000)
    base = np.array([profile.base_s(int(t)) for t in sizes])
    for tangent in tangents(profile, 1_000):
        line = tangent.alpha_s + tangent.beta_s * sizes
        assert (line <= base + 1e-15).all()
        assert tangent.alpha_s >= 0.0
        if tangent.tokens < inf:
            touch = tangent.alpha_s + tangent.beta_s * tangent.tokens
            assert touch == pytest.approx(profile.base_s(1) if tangent.tokens == 1 else touch)
            assert np.min(base - line) < 1e-7


def test_the_charge_of_a_prompt_and_its_tokens_by_hand() -> None:
    # Prompt of 100, 3 tokens: prefill 100*0.1 + 0.0001*100^2 ms, then two decodes of 0.1 + 0.01*context (100, 101) ms;
    # a step's 10 ms are shared by 8 sequences: 3 steps.
    one = demand([100], [3])
    supply = supply_of(LINEAR)
    slots = next(s for s in sharings(one, supply, in_flight=False) if s.name == "slots")
    line = Tangent(tokens=inf, alpha_s=0.010, beta_s=0.0001)
    charged = least_work([prices(one, supply, line, slots)], [1.0], one)[0]
    assert charged == close((10 + 1 + (0.1 + 1.00) + (0.1 + 1.01) + 3 * 10 / 8) / 1000)
    assert charged < (10 + 1 + (0.1 + 1.00) + (0.1 + 1.01) + 3 * 10 / 8) / 1000, "rounding is on the safe side"


def test_prompts_longer_than_the_budget_take_several_steps_of_the_fixed_part() -> None:
    long = demand([2_500], [1])
    shared = {s.name: s for s in sharings(long, supply_of(LINEAR), in_flight=False)}
    assert shared["slots"].prefill[0] == 3 / 8
    assert shared["kv"].prefill[0] == 3 * 2_500 / 100_000
    assert shared["tokens"].prefill[0] == 2.5


def test_a_full_engine_in_lockstep_is_bounded_exactly() -> None:
    # Eight equal requests fill the slots of every step: nothing is lost to any inequality, but that the engine
    # starts the first the moment it comes, one step before the others.
    inputs, outputs = [100] * 8, [50] * 8
    assert request_work_s(LINEAR, inputs, outputs).sum() == close(busy_s(LINEAR, inputs, outputs) - 0.010)


def test_prefill_that_fills_every_step_is_bounded_exactly() -> None:
    inputs, outputs = [500] * 40, [1] * 40
    assert request_work_s(LINEAR, inputs, outputs).sum() == close(busy_s(LINEAR, inputs, outputs) - 0.010)


def test_decoding_that_fills_the_cache_is_bounded_closely() -> None:
    small = replace(LINEAR, kv_capacity_tokens=4 * 1_002, max_num_batched_tokens=4_000, q_ms_per_token_squared=0.0)
    inputs, outputs = [1_000] * 4, [2] * 4
    # One step for the four prompts, one for the second tokens; each request holds a quarter of the cache.
    prefill_ms = 10 + 4 * 1_000 * 0.1
    decode_ms = 10 + 4 * 0.1 + 4 * 1_000 * 0.01
    found = request_work_s(small, inputs, outputs).sum()
    assert found == pytest.approx((decode_ms + prefill_ms) / 1000, rel=3e-4)
    assert found <= busy_s(small, inputs, outputs)


def test_a_lone_token_at_its_own_pace_is_charged_its_whole_step() -> None:
    # 10 + 0.1 + 0.01*100 ms for the second token; an ITL of just that forbids sharing the step with anyone.
    step_s = 0.0111
    work = request_work_s(LINEAR, [100], [2], step_s)[0]
    prefill_s = 0.011
    assert work == pytest.approx(step_s + prefill_s, rel=1e-3)
    assert work < step_s + prefill_s
    relaxed = request_work_s(replace(LINEAR, max_num_seqs=10**6), [100], [2], 10.0)[0]
    assert relaxed < work / 1.8


def test_alone_in_its_window_a_request_pays_every_step_alone() -> None:
    alone = demand([100, 100], [50, 50], arrival_s=[0.0, 100.0], due_s=[20.0, 120.0])
    charged = least_work([best_prices(alone, supply_of(LINEAR))], [1.0], alone)
    assert charged[0] == charged[1] == close(busy_s(LINEAR, [100], [50]))
    together = demand([100, 100], [50, 50], arrival_s=[0.0, 10.0], due_s=[20.0, 30.0])
    shared = least_work([best_prices(together, supply_of(LINEAR))], [1.0], together)
    assert shared.sum() == close(busy_s(LINEAR, [100, 100], [50, 50]) - 0.010)


@pytest.mark.parametrize("profile", [LINEAR, KNEE])
def test_the_engine_of_the_simulator_is_never_faster_than_the_bound(profile: Profile) -> None:
    random = np.random.default_rng(5)
    for count in (1, 7, 60):
        inputs = random.integers(1, 4_000, count).tolist()
        outputs = random.integers(1, 200, count).tolist()
        ratio = request_work_s(profile, inputs, outputs).sum() / busy_s(profile, inputs, outputs)
        assert ratio <= 1.0
        if count == 60:
            assert ratio > 0.7, "a busy engine is bounded tightly"


def test_a_tighter_itl_never_lowers_the_bound() -> None:
    random = np.random.default_rng(1)
    inputs, outputs = random.integers(1, 3_000, 300), random.integers(1, 400, 300)
    totals = [request_work_s(KNEE, inputs, outputs, itl).sum() for itl in (inf, 1.0, 0.1, 0.08, 0.06, 0.05)]
    assert totals == sorted(totals)
    assert totals[-1] > 1.01 * totals[0]


def test_more_requests_never_lower_the_bound() -> None:
    random = np.random.default_rng(2)
    inputs, outputs = random.integers(1, 3_000, 200), random.integers(1, 400, 200)
    totals = [request_work_s(KNEE, inputs[:n], outputs[:n], 0.1).sum() for n in range(1, 200, 7)]
    assert totals == sorted(totals)


def test_each_part_runs_on_the_kind_that_is_cheapest_for_it() -> None:
    # One kind prefills for nothing, the other decodes for nothing; moving between them costs nothing in the bound.
    thinker = replace(LINEAR, h_ms=0.1, f_ms_per_token=0.0001, c_ms_per_context_token=1.0, q_ms_per_token_squared=0.0)
    talker = replace(LINEAR, h_ms=0.1, f_ms_per_token=1.0, c_ms_per_context_token=0.0)
    one = demand([1_000], [100])
    no_share = Sharing(name="none", first=np.zeros(1), last=np.zeros(1), prefill=np.zeros(1))
    kinds = [
        prices(one, supply_of(p), Tangent(tokens=inf, alpha_s=0.0, beta_s=p.f_ms_per_token / 1000), no_share)
        for p in (thinker, talker)
    ]
    # On the thinker even decoding is cheap: a dropped context is prefilled again for 0.0001 ms a token.
    assert least_work(kinds, [1.0, 1.0], one)[0] == pytest.approx(0.0001 + 99 * 0.0001 * 1050 / 1000, rel=0.02)
    assert least_work(kinds, [1.0, 0.0], one)[0] == 0.0
    assert least_work(kinds[1:], [1.0], one)[0] > 1.0


def test_a_request_longer_than_the_cache_has_no_finite_work() -> None:
    assert np.isinf(request_work_s(LINEAR, [100_000, 10], [1, 1])).tolist() == [True, False]


def test_an_itl_that_nobody_can_meet_is_dropped_with_its_window() -> None:
    both = demand([100, 100], [2, 2], itl_s=0.0111, due_s=[1.0, 2.0])
    impossible = replace(both, itl_s=np.array([0.005, 0.0111]))
    kept = with_feasible_itl(impossible, (supply_of(LINEAR),))
    assert kept.itl_s.tolist() == [inf, 0.0111]
    assert kept.due_s.tolist() == [inf, 2.0]


def test_no_request_at_all_is_no_work() -> None:
    assert request_work_s(LINEAR, [], []).sum() == 0.0


def test_the_engine_rounds_by_no_more_than_the_bound_allows() -> None:
    # The worst that rounding can do: coefficients just below half a unit of 2^-32 s, over a whole segment.
    tiny = replace(LINEAR, h_ms=1.0, f_ms_per_token=1e-9, c_ms_per_context_token=0.49 * 2.0**-32 * 1000)
    exact = sum(tiny.step_s(decoding=1, context_tokens=10 + k) for k in range(4_000))
    prefill = tiny.step_s(decoding=0, context_tokens=0, prefill_tokens=10)
    short = exact + prefill - busy_s(tiny, [10], [4_001])
    assert 0.1 * 4_000 * ROUNDING_S < short < 4_001 * ROUNDING_S
