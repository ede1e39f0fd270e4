"""SLOs-Serve: whom a plan admits, what a step holds, who gives way, and which instance is asked next."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import inf
from random import Random

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, Request, RequestClass
from chiron.policies.rivals.schedulers.slos_serve import (
    NextReplica,
    Prompt,
    SlosServe,
    SlosServeSettings,
    Steps,
    compose,
    largest,
    plan,
)
from chiron.policies.views import StepView
from policy_factory import CHAT, JOBS
from scenario_factory import PROFILE, kind_of

DEFAULT = SlosServeSettings()


def steps(decodes: dict[float, int] | None = None, kv_tokens: float = 1e6) -> Steps:
    """Tokens of a step are 1,000 times its seconds, 500 at the most."""
    return Steps(lambda within_s: (min(500.0, 1000 * within_s), min(0.5, within_s)), decodes or {}, kv_tokens)


def prompt(due_s: float, tokens: int, *, itl_s: float = 0.1, kv_tokens: float = 1.0, new: bool = True) -> Prompt:
    return Prompt(due_s, tokens, itl_s, kv_tokens, new)


@pytest.mark.parametrize(
    ("prompts", "stated", "expected"),
    [
        # Nobody decodes: two steps of 500 tokens in a second.
        pytest.param([prompt(1.0, 1000)], steps(), {0}, id="what fits"),
        pytest.param([prompt(1.0, 1001)], steps(), set(), id="and no more"),
        # At an ITL SLO of 100 ms, ten steps of 100 tokens, 40 of which decode.
        pytest.param([prompt(1.0, 600)], steps({0.1: 30, 0.2: 10}), {0}, id="what those who decode leave"),
        pytest.param([prompt(1.0, 601)], steps({0.1: 30, 0.2: 10}), set(), id="likewise"),
        # The first decodes once it is done: ten steps of 99 until the second is due.
        pytest.param([prompt(1.0, 1000), prompt(2.0, 990)], steps(), {0, 1}, id="who is admitted decodes"),
        pytest.param([prompt(1.0, 1000), prompt(2.0, 991)], steps(), {1}, id="as many, and more carried on"),
        pytest.param([prompt(1.0, 400), prompt(2.0, 1590)], steps(), {0, 1}, id="what is left is carried on"),
        pytest.param([prompt(1.0, 900), prompt(1.0, 500), prompt(1.0, 500)], steps(), {1, 2}, id="the most requests"),
        pytest.param([prompt(1.0, 9), prompt(1.0, 9)], steps(kv_tokens=1.5), {1}, id="whose KV has room"),
        pytest.param([prompt(1.0, 600, new=False), prompt(1.0, 500)], steps(), set(), id="before others, the admitted"),
        pytest.param([prompt(1.0, 400, new=False), prompt(2.0, 1590)], steps(), {1}, id="who was admitted decodes"),
        pytest.param([prompt(1.0, 400, new=False), prompt(2.0, 1591)], steps(), set(), id="likewise too"),
        pytest.param([prompt(0.5, 100), prompt(1.0, 900, new=False)], steps(), set(), id="whom nobody makes late"),
        pytest.param([prompt(0.5, 900, new=False), prompt(2.0, 100)], steps(), {1}, id="late as it is"),
        pytest.param([prompt(9.0, 100, itl_s=0.03)], steps({0.1: 30}), set(), id="whose own pace the step cannot keep"),
        pytest.param([prompt(inf, 10_000)], steps(), {0}, id="without a deadline"),
        # The largest step takes half a second; a shorter one will do.
        pytest.param([prompt(0.4, 400)], steps(), {0}, id="due before the largest step ends"),
        pytest.param([prompt(0.4, 401)], steps(), set(), id="and no more than a shorter one holds"),
        pytest.param([prompt(0.05, 20)], steps({0.1: 30}), {0}, id="due before a step of the tightest ends"),
        # Twenty steps of 99, or less as more decode, hold 40 prompts of 20 that are due every 50 ms.
        pytest.param(
            [*(prompt(0.05 * n, 20, new=False) for n in range(1, 40)), prompt(2.0, 20)],
            steps({0.1: 1}),
            {39},
            id="due at shorter intervals than a step",
        ),
    ],
)
def test_a_plan_admits_the_most_that_are_in_time(prompts: list[Prompt], stated: Steps, expected: set[int]) -> None:
    assert plan(DEFAULT, 0.0, prompts, stated) == expected


def test_the_reproduction_carries_no_more_than_a_step() -> None:
    prompts = [prompt(1.0, 100), prompt(2.0, 1091)]
    assert plan(DEFAULT, 0.0, prompts, steps()) == {0, 1}
    # 500 of 900 are carried on, and ten steps hold 99.
    assert plan(replace(DEFAULT, caps_carry=True), 0.0, prompts, steps()) == {0, 1}
    prompts[1] = prompt(2.0, 1491)
    assert plan(DEFAULT, 0.0, prompts, steps()) == {0, 1}
    assert len(plan(replace(DEFAULT, caps_carry=True), 0.0, prompts, steps())) == 1


def test_a_plan_is_as_good_as_trying_every_choice() -> None:
    """One ITL SLO, the same for all: the plan is optimal."""
    draw = Random(3)
    for _ in range(60):
        prompts = sorted(prompt(draw.uniform(0, 4), draw.randint(50, 900)) for _ in range(6))

        def held(decodes: int, passed_s: float) -> float:
            size, takes_s = (100, 0.1) if decodes else (500, 0.5)
            whole, rest_s = divmod(passed_s, takes_s)
            return (size - decodes) * whole + max(0.0, 1000 * rest_s - decodes)

        def in_time(places: tuple[int, ...], prompts: list[Prompt] = prompts) -> bool:
            forced = [each._replace(new=False) for place, each in enumerate(prompts) if place in places]
            left, before_s, decodes = 0.0, 0.0, 0
            for place, each in enumerate(prompts):
                left += held(decodes, each.due_s) - held(decodes, before_s)
                before_s = each.due_s
                if place in places:
                    left -= each.tokens
                    decodes += 1
                    if left < 0:
                        return False
            return bool(forced) or not places

        most = max(n for n in range(7) if any(in_time(places) for places in combinations(range(6), n)))
        admitted = plan(DEFAULT, 0.0, prompts, steps())
        assert in_time(tuple(sorted(admitted)))
        assert len(admitted) == most


@pytest.mark.parametrize(("within_s", "expected"), [(0.5, 490), (0.1, 90), (0.0105, 0), (0.011, 1), (9.0, 1000)])
def test_the_largest_step_that_is_no_longer(within_s: float, expected: int) -> None:
    assert largest(lambda tokens: 0.01 + 0.001 * tokens - 1e-12, 1000, within_s) == expected


# -- in an engine --------------------------------------------------------------------------------------------------


def view(now_s: float = 0.0, **changes: int) -> StepView:
    """Steps of 10 ms and a tenth of one for each token of prompt."""
    given = {
        "step": 9, "decoding": 0, "tokens_max": 2048, "kv_free_tokens": 90_000, "kv_capacity_tokens": 90_000,
        "places": 64, "places_free": 64,
    }  # fmt: skip
    return StepView(now_s=now_s, step_s=lambda tokens, done: 0.01 + 1e-4 * tokens, **(given | changes))


def request(id: int, tokens: int, *, cls: RequestClass = CHAT, arrival_s: float = 0.0) -> Request:
    return Request(id, "m", cls, arrival_s, tokens)


def made(*requests: Request) -> SlosServe:
    composer = compose(DEFAULT, Learner((CHAT, JOBS)))
    for each in requests:
        composer.add(each, each.input_tokens, False)
    return composer


def heads(composer: SlosServe, **changes: int) -> list[int]:
    composer.tokens(view(**changes))
    found = []
    while (head := composer.head(0.0, False)) is not None:
        found.append(head.id)
        composer.remove_head(head)
    return found


def test_admitted_prompts_go_by_deadline_then_the_declined_then_batch_work() -> None:
    batch, huge, late = request(1, 10, cls=JOBS), request(2, 60_000), request(3, 10, arrival_s=0.5)
    assert heads(made(batch, huge, late, request(4, 10, arrival_s=0.2))) == [4, 3, 2, 1]


def test_a_step_is_as_long_as_the_admitted_that_decode_allow() -> None:
    composer, first = made(), request(1, 10)
    assert composer.tokens(view()) == 2048
    composer.began(request(8, 10, cls=JOBS), 1, 0, 0.0)
    assert composer.tokens(view(decoding=1)) == 2048, "best effort"
    composer.add(first, 10, False)
    composer.tokens(view(decoding=1))
    composer.remove_head(first)
    composer.began(first, 1, 0, 0.0)
    assert composer.tokens(view(decoding=2)) == 1900, "10 ms and 190"
    composer.left(first)
    assert composer.tokens(view(decoding=1)) == 2048


def test_best_effort_gives_way_the_last_first() -> None:
    old, young = request(8, 100, cls=JOBS), request(9, 100, cls=JOBS)

    def composer(*waiting: Request) -> SlosServe:
        composer = made(*waiting)
        for each in (old, young):
            composer.began(each, 1, 0, 0.0)
        return composer

    full = {"decoding": 2, "places_free": 0}
    assert composer(request(1, 500)).gives_way(view(**full)) == [young]
    assert composer(request(1, 500)).gives_way(view(**{**full, "kv_free_tokens": 300})) == [young, old]
    assert composer(request(1, 500)).gives_way(view(**{**full, "kv_free_tokens": 100})) == (), "that would not do"
    assert composer(request(1, 500)).gives_way(view(decoding=2)) == [], "it has room"
    assert composer(request(1, 60_000)).gives_way(view(**full)) == (), "it is not admitted"
    assert composer(request(1, 500)).gives_way(view(**full, step=0)) == (), "whoever has just begun has its token"
    assert composer().victim() is young
    assert made().victim() is None


# -- in front of engines -------------------------------------------------------------------------------------------


def test_the_next_instance_is_asked_where_a_plan_has_no_room() -> None:
    profile = replace(PROFILE, kv_capacity_tokens=200_000, max_num_seqs=64, max_num_batched_tokens=2048)
    learner = Learner((CHAT, JOBS))

    def placed_on(hops_max: int) -> list[int]:
        router = NextReplica(SlosServeSettings(hops_max=hops_max), learner)
        instances = [Instance(id, "m", kind_of(profile), "mixed", 0.0) for id in (1, 2, 3)]
        for each in instances:
            router.add(each)
        whole = int(5.0 / learner.step_times.per_prefill_token_s * 0.6)
        found = []
        for id in range(1, 5):
            one = request(id, whole)
            placement = router.place(one, 0.0)
            assert placement is not None
            one.instance = placement.instance
            placement.instance.requests[id] = one
            if placement.instance.id == 1:  # As if 2 and 3 ran more of what takes no prefill.
                router.changed(placement.instance)
            found.append(placement.instance.id)
            for other in instances[1:]:
                other.requests |= {100 + n: one for n in range(3)}
                router.changed(other)
        return found

    assert placed_on(3) == [1, 2, 3, 1], "then as best effort where the fewest are"
    assert placed_on(0) == [1, 1, 1, 1]


def chat_room(instance: Instance) -> bool:
    router = NextReplica(SlosServeSettings(), Learner((CHAT, JOBS)))
    router.add(instance)
    router.place(request(1, 10, cls=JOBS), 0.0)
    return router._has_room(instance, request(2, 100), 0.0)


def test_batch_work_that_queues_in_an_engine_takes_no_place_in_a_plan() -> None:
    profile = replace(PROFILE, kv_capacity_tokens=200_000, max_num_seqs=64, max_num_batched_tokens=2048)
    instance = Instance(1, "m", kind_of(profile), "mixed", 0.0)
    instance.class_counts["jobs"] = 50_000
    assert chat_room(instance)


def test_an_instance_that_is_too_small_is_not_one_of_those_asked() -> None:
    router = NextReplica(SlosServeSettings(hops_max=0), Learner((CHAT, JOBS)))
    for id, kv_tokens in enumerate((10_000, 10_000, 10_000, 200_000), start=1):
        router.add(Instance(id, "m", kind_of(PROFILE, kv_capacity_tokens=kv_tokens), "mixed", 0.0))
    for cls in (CHAT, JOBS):
        placements = [router.place(request(7, tokens, cls=cls), 0.0) for tokens in (50_000, 9_999, 250_000)]
        assert [placement and placement.instance.id for placement in placements] == [4, 1, None]


def test_a_plan_takes_the_kv_of_the_predicted_answer() -> None:
    composer = compose(DEFAULT, Learner((CHAT, JOBS)))
    known, unknown = Request(1, "m", CHAT, 0.0, 100), Request(2, "m", CHAT, 0.0, 100)
    known.predicted_tokens = 7000
    for each in (known, unknown):
        composer.add(each, 100, False)
    planned = {id: composer._planned(prompt).kv_tokens for id, prompt in composer._prompts.items()}
    assert planned == {1: 7100, 2: 100 + Learner((CHAT, JOBS)).expected_output["chat"]}
    router = NextReplica(DEFAULT, Learner((CHAT, JOBS)))
    assert router._prompt(known, new=True).kv_tokens == 7100
