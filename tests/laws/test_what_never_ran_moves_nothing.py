"""Law 11: refused, cancelled, failed and retried requests leave plans, limits and learned values as the others alone
would have made them.

Two laws, because a request that is open may yet run and is load until it ends. One that ends at once leaves no trace
at all: every decision, with all its numbers, is the same. One that stays for a while may make the fleet grow for it,
and then leaves nothing behind: nothing that was learned, no arrival, and after the time that plans are held no plan.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from chiron.control.dispatcher import RETRIES_MAX
from effort import examples
from never_ran import CHAT, CLASSES, KIND, NIGHT, VOICE, Ask, World

TOKENS_MAX = 100_000
"""As long as has room beside others: what must wait for an empty instance does not end at once."""

real = st.builds(
    Ask,
    at_s=st.integers(0, 1200).map(lambda tick: tick / 10.0),
    cls=st.sampled_from(CLASSES),
    tokens_in=st.integers(1, 4000),
    tokens_out=st.integers(1, 300),
)
never = st.builds(
    Ask,
    at_s=st.integers(0, 1200).map(lambda tick: tick / 10.0),
    cls=st.sampled_from(CLASSES),
    tokens_in=st.one_of(st.integers(1, TOKENS_MAX), st.just(KIND.kv_capacity_tokens)),
    end=st.sampled_from(("refuse", "fail", "lose", "leave")),
    ttft_s=st.sampled_from((0.0, 3600.0)),
)


def waiting(world: World) -> list[Ask]:
    """Of those that never run, who did not end at once."""
    return [r.payload for r in world.over.values() if not r.payload.runs and r.finish_s > r.arrival_s]


def steady(seconds: int = 120, per_s: int = 4) -> list[Ask]:
    """Traffic enough to learn from, and for more than one instance."""
    return [
        Ask(at_s=second + n / per_s, cls=(CHAT, VOICE)[second % 2], tokens_in=8000, tokens_out=200)
        for second in range(seconds)
        for n in range(per_s)
    ]


@pytest.mark.parametrize("policy", ["chiron", "chiron-paper"])
@settings(max_examples=examples(15), deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.lists(real, max_size=30), st.lists(never, min_size=1, max_size=30))
@example(  # Its instance's load was looked at anew, the others' not.
    [Ask(at_s=82.0, cls=NIGHT, tokens_in=1493, tokens_out=280)], [Ask(at_s=10.2, cls=CHAT, tokens_in=2263, end="fail")]
)
def test_what_ends_at_once_without_running_changes_no_decision(policy: str, some: list[Ask], others: list[Ask]) -> None:
    reals = steady() + some
    alone = World(reals, until_s=200.0, policy=policy, initial=8)
    among = World(reals + others, until_s=200.0, policy=policy, initial=8)
    # Batch work that found no room at once was open for a while.
    waited = [id(ask) for ask in waiting(among)]
    others = [other for other in others if id(other) not in waited]
    among = World(reals + others, until_s=200.0, policy=policy, initial=8)
    assume(not waiting(among))

    assert sum(r.outcome == "finished" for r in among.over.values()) == len(reals)
    assert len(among.over) == len(reals) + len(others)
    assert among.learned() == alone.learned()
    assert len(alone.decisions) > 5 or policy != "chiron", "there is something to change"
    assert among.decisions == alone.decisions
    assert among.plans == alone.plans
    assert among.limits() == alone.limits()
    assert among.history() == alone.history()


@settings(max_examples=examples(15), deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    st.lists(
        st.builds(
            replace,
            never,
            after_s=st.floats(0.01, 50.0),
            tokens_in=st.integers(1, 20_000),
            ttft_s=st.just(0.0),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_what_stays_for_a_while_without_running_leaves_nothing_behind(others: list[Ask]) -> None:
    reals = steady(seconds=300)
    alone = World(reals, until_s=320.0, initial=8)
    among = World(reals + others, until_s=320.0, initial=8)

    assert len(among.over) == len(reals) + len(others)
    known, alike = among.learned(), alone.learned()
    # Who runs beside whom differs, and so which instance's scrapes are learned from, and which come first.
    times, times_alone = known.pop("step times"), alike.pop("step times")
    assert known == alike
    assert times.fixed_s == pytest.approx(times_alone.fixed_s, rel=0.02)
    assert among.history() == alone.history()
    assert among.plans[-1] == alone.plans[-1]


def test_one_giant_that_an_engine_refuses_grows_no_fleet_and_cuts_no_batch_size() -> None:
    few = [Ask(at_s=float(second), tokens_in=300, tokens_out=60) for second in range(600)]
    giant = Ask(at_s=100.5, tokens_in=TOKENS_MAX, end="refuse")
    world = World([*few, giant], until_s=600.0)
    assert {sum(plan.values()) for _, plan in world.plans} == {1}
    assert world.limits() == World(few, until_s=600.0).limits()
    assert world.over[101].outcome == "rejected"


def test_a_ttft_that_a_client_asked_for_holds_up_no_batch_work() -> None:
    hasty = [Ask(at_s=1.0, ttft_s=1e-6, end="refuse"), Ask(at_s=2.0, ttft_s=1e-6)]
    assert World(hasty, until_s=5.0).learned()["ttft_s"] == (CHAT.ttft_s, CHAT.ttft_s)


def test_tries_of_one_request_are_one_arrival() -> None:
    world = World([Ask(at_s=1.5, end="lose", after_s=20.0)], until_s=10.0)
    assert sum(map(sum, world.history()["counts"])) == 1.0
    assert not world.over
    gone = World([Ask(at_s=1.5, end="lose", after_s=4.0)], until_s=10.0)
    assert sum(map(sum, gone.history()["counts"])) == 0.0
    assert gone.over[0].retries == RETRIES_MAX + 1


def test_what_a_client_took_back_half_way_counts_for_what_it_ran() -> None:
    """Its prompt was computed, and so many tokens were made."""
    world = World([Ask(at_s=1.5, tokens_in=700, tokens_out=300, end="finish")], until_s=3.0)
    (request,) = world.plane.instances[1].requests.values()
    request.tokens_done = 40  # As its engine says when it lets go.
    world.plane.cancel(request)
    world.clock.run_until(10.0)
    (mix, *_) = world.learned()["mixes"]
    assert request.outcome == "cancelled"
    assert sum(map(sum, world.history()["counts"])) == 1.0
    assert mix.input_tokens == 700.0
    assert mix.finished == 1
    assert mix.output_tokens == pytest.approx(200.0 + (40 - 200) / 11)


def test_an_item_of_a_job_that_is_taken_back_half_way_teaches_no_length() -> None:
    """It runs later, from its beginning or from where it was."""
    world = World([Ask(at_s=1.5, cls=NIGHT, tokens_out=300)], until_s=3.0)
    (request,) = world.plane.instances[1].requests.values()
    request.tokens_done = 40
    world.plane.cancel(request)
    world.clock.run_until(10.0)
    assert [mix.finished for mix in world.learned()["mixes"]] == [0, 0, 0]


def test_work_shed_for_want_of_room_is_load_all_the_same() -> None:
    world = World([Ask(at_s=1.5, end="refuse", after_s=100.0)], until_s=3.0)
    (request,) = world.plane.instances[1].requests.values()
    world.plane.cut_off(request)
    world.clock.run_until(10.0)
    assert request.outcome == "shed"
    assert sum(map(sum, world.history()["counts"])) == 1.0
    assert world.learned()["seen"] == [0, 0, 0], "it ran nowhere"


@pytest.mark.slow
def test_batch_work_taken_back_is_not_taken_for_batch_work_done() -> None:
    """What leaves the queue is measured against spare capacity; what was withdrawn was not done there."""
    asks = steady(seconds=200)
    alone = World(asks, until_s=190.0)
    among = World([*asks, *(Ask(at_s=50.0, cls=NIGHT, end="leave", after_s=7.0) for _ in range(200))], until_s=190.0)
    trust, before = (w.plane.fleet_state["m"].spare_trust for w in (among, alone))
    assert trust == pytest.approx(before, abs=0.15)
