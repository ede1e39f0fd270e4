"""DynamoLLM's pools by length, and a fleet for half an hour at a time."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf
from typing import Any

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, Request
from chiron.policies.capacity import capacity, work_s
from chiron.policies.rivals.scalers.dynamollm import (
    SHARES_EVERY,
    DynamoLlmSettings,
    Pools,
    decide_fleet,
    pools,
    type_of,
)
from policy_factory import CHAT, JOBS, TIMES, arrival, fleet, fleet_of, mix, model
from scenario_factory import PROFILE, kind_of

DEFAULT = DynamoLlmSettings(utilisation=1.0)
KV_TOKENS = 1_000_000


@pytest.mark.parametrize(
    ("prompt", "answer", "type"),
    [(255, 99, 0), (256, 99, 3), (1023, 100, 4), (1024, 99, 6), (100, 350, 2), (9000, 350, 8)],
)
def test_there_are_nine_types(prompt: int, answer: int, type: int) -> None:
    assert type_of(prompt, answer) == type


@pytest.mark.parametrize(
    ("shares", "count", "made"),
    [
        ([0.5, 0.0, 0.5], 4, [2, 0, 2]),
        ([0.3, 0.3, 0.4], 4, [1, 1, 2]),  # 1.2, 1.2 and 1.6: a fifth, then two fifths go on to the next
        ([0.2, 0.2, 0.6], 4, [0, 1, 3]),
        ([0.1, 0.1, 0.0], 4, [2, 2, 0]),
        ([0.0, 0.0, 0.0], 3, [0, 0, 3]),
        ([0.9, 0.1, 0.0], 0, [0, 0, 0]),
        ([0.4, 0.4, 0.2], 1, [0, 0, 1]),
    ],
)
def test_what_is_no_whole_instance_goes_to_the_next_larger_pool(
    shares: list[float], count: int, made: list[int]
) -> None:
    assert pools(shares, count) == made


def ready(count: int, **changes: Any) -> tuple[Pools, list[Instance]]:
    router = Pools(Learner((CHAT, JOBS)))
    kind = kind_of(PROFILE, **({"max_num_seqs": 1000, "kv_capacity_tokens": 1_000_000} | changes))
    made = [Instance(id, "m", kind, "mixed", 0.0) for id in range(count)]
    for instance in made:
        router.add(instance)
    return router, made


def put(router: Pools, id: int, tokens: int) -> int:
    """Where it runs."""
    request = Request(id, "m", CHAT, 0.0, tokens)
    placement = router.place(request, 0.0)
    assert placement is not None
    instance = placement.instance
    instance.requests[id] = request
    instance.sequences += 1
    router.changed(instance)
    return instance.id


def taught(router: Pools) -> None:
    """Until the pools follow: of 21 requests 20 are short."""
    for id in range(SHARES_EVERY):
        put(router, id, 4000 if id % 21 == 0 else 100)


def test_short_and_long_prompts_run_apart_in_proportion_to_their_work() -> None:
    router, _ = ready(6)
    taught(router)
    short = {put(router, 1000 + id, 100) for id in range(200)}
    long = {put(router, 2000 + id, 4000) for id in range(200)}
    assert short
    assert long
    assert not short & long
    assert max(short) < min(long)
    assert short | long == set(range(6))


def test_requests_go_to_a_larger_pool_while_their_own_is_full_and_to_their_own_while_all_are() -> None:
    router, made = ready(6)
    taught(router)
    short = {put(router, 1000 + id, 100) for id in range(50)}
    for instance in made:
        instance.max_batch_size = instance.sequences if instance.id in short else 1000
        router.changed(instance)
    assert put(router, 2000, 100) not in short
    for instance in made:
        instance.max_batch_size = 1
        router.changed(instance)
    assert put(router, 2001, 100) in short


def test_a_long_prompt_goes_to_a_smaller_pool_only_where_no_larger_one_has_an_instance() -> None:
    router, made = ready(2)
    for id in range(2 * SHARES_EVERY):
        put(router, id, 100)
    assert {put(router, 1000 + id, 4000) for id in range(4)} == {0, 1}
    for instance in made:
        router.remove(instance)
    assert router.place(Request(9, "m", CHAT, 0.0, 10), 0.0) is None
    router.add(made[1])
    assert put(router, 5000, 100) == 1


# -- the fleet -----------------------------------------------------------------------------------------------------


def minutes(rates: list[int], settings: DynamoLlmSettings = DEFAULT, **changes: Any) -> list[Any]:
    """Plans of ticks a minute apart, with so many requests a second before each; the fleet is the plan at once."""
    state, made, current = None, [], 4
    for number, rate in enumerate([0, *rates]):
        now_s = 6000.0 + 60.0 * number
        seconds = range(int(now_s) - 60, int(now_s)) if rate else range(0)
        arrivals = tuple(arrival(second, rate) for second in seconds)
        one = model(fleet_of(current, **changes), arrivals=arrivals, kv_capacity_tokens=KV_TOKENS)
        decided, state = decide_fleet(settings, state, fleet(one, now_s=now_s, since_s=60.0))
        current = decided["llama"].counts["mixed"]
        made.append(decided["llama"])
    return made[1:]


def needed(rate: float) -> float:
    """Instances that it keeps busy."""
    of = mix(CHAT)
    carried = capacity(TIMES, [(1.0, of)], itl_target_s=CHAT.itl_s, kv_capacity_tokens=KV_TOKENS, max_num_seqs=256)
    return rate * work_s(TIMES, of) / carried.work_rate


def test_the_fleet_of_an_epoch_is_for_the_busiest_minute_of_the_last_one() -> None:
    rates = [20, 60, 20, 20, 20] + [30] * 29 + [90] + [10] * 30
    plans = minutes(rates)
    counts = [plan.counts["mixed"] for plan in plans]
    assert counts[:4] == [4] * 4
    assert counts[4] == ceil(needed(60.0))  # After five minutes,
    assert set(counts[4:34]) == {counts[4]}
    assert counts[34] == ceil(needed(90.0)) > counts[4]  # and half an hour later.
    assert counts[64] == ceil(needed(10.0))
    assert plans[4].numbers["busiest"] == pytest.approx(needed(60.0))
    half = minutes(rates[:5], replace(DEFAULT, utilisation=0.5))[-1]
    assert half.counts["mixed"] == ceil(2.0 * needed(60.0))


@pytest.mark.parametrize(("deadline_s", "over_s"), [(3600.0, 1800.0), (900.0, 900.0)])
def test_a_batch_that_comes_at_once_counts_as_if_it_came_evenly_until_it_must_be_planned_again(
    deadline_s: float, over_s: float
) -> None:
    jobs = replace(JOBS, deadline_s=deadline_s)
    state: Any = None
    for number in range(6):
        now_s = 6000.0 + 60.0 * number
        arrivals = (arrival(int(now_s) - 5, 3000, jobs),) if number == 2 else (arrival(int(now_s) - 5, 60),)
        one = model(fleet_of(4), arrivals=arrivals, mixes=(mix(CHAT), mix(jobs)), kv_capacity_tokens=KV_TOKENS)
        plans, state = decide_fleet(DEFAULT, state, fleet(one, now_s=now_s))
    batch = 3000 / over_s * needed(1.0)  # Requests are alike; those of the first five minutes count no more.
    assert plans["llama"].numbers["batch"] == pytest.approx(batch)
    assert plans["llama"].counts["mixed"] == ceil(batch + needed(1.0))


def test_an_idle_epoch_ends_with_the_least_and_missing_scrapes_hold_the_fleet() -> None:
    assert minutes([0] * 5)[-1].counts["mixed"] == 1
    blind = minutes([1] * 8, sample_age_s=inf)
    assert [plan.counts["mixed"] for plan in blind] == [4] * 8
    assert blind[-1].reason == "metrics_missing"


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tick_s is 60\.0; it must be at most epoch_s \(30\.0\)"):
        DynamoLlmSettings(epoch_s=30.0)
    with pytest.raises(ValueError, match=r"utilisation is 2\.0; it must be above 0 and at most 1"):
        replace(DEFAULT, utilisation=2.0)
