"""Load is kept for two weeks at falling resolution, and what comes back after an hour or a week is planned for."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from chiron.core.kept import Kept
from chiron.core.types import RequestClass
from chiron.policies.chiron.global_loop import decide_fleet, prepare
from chiron.policies.chiron.load import (
    ModelMemory,
    backtested,
    begun,
    first_memory,
    recurring_to,
    remember,
)
from chiron.policies.chiron.load_history import remembered, worth
from chiron.policies.chiron.load_kept import learned_load, restored_load
from chiron.policies.chiron.long_history import (
    MINUTES_MAX,
    QUARTERS_MAX,
    LongHistory,
    all_minutes,
    by_minute,
    foretold,
    foretold_now,
    nothing_before,
    recurrences,
    resumed,
)
from chiron.policies.chiron.recurrence import Look, Record, Recurrence, aged, looked
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.fluid_queue import Floats
from chiron.policies.headroom import CONSTANT, Backtest, Headroom, Question, missed
from policy_factory import CHAT, TIMES, arrival, fleet, fleet_of, mix, model

HOUR_S, DAY_S = 3600, 86_400
SLACK_S = 4.0
NONE = np.zeros(0)


def kept(load: Floats, piece_s: int = HOUR_S, long: LongHistory | None = None) -> LongHistory:
    long = long or nothing_before(0)
    for begin in range(0, len(load), piece_s):
        long = long.after(load[begin : begin + piece_s], SLACK_S)
    return long


def peaks(seconds: int, at_s: list[int], *, lasts_s: int = 180) -> Floats:
    """One instance, and nine from these seconds on."""
    load = np.ones(seconds)
    for second in at_s:
        load[second : second + lasts_s] = 9.0
    return load


def test_two_weeks_are_kept_in_bounded_memory_finer_the_younger_they_are() -> None:
    load = peaks(17 * DAY_S + 1234, [DAY_S // 2, 10 * DAY_S + 7200, 17 * DAY_S - 600])
    long = kept(load)
    assert long.quarters.shape == (2, QUARTERS_MAX)
    assert MINUTES_MAX - 15 < long.minutes.shape[1] <= MINUTES_MAX
    assert long.seconds.shape == (1234 % 60,)
    assert sum(part.nbytes for part in (long.quarters, long.minutes, long.seconds)) < 70_000
    minutes = all_minutes(long, NONE, SLACK_S)
    assert minutes.ago(len(load) - DAY_S // 2 - 1) < 0, "more than two weeks and two days ago"
    for at_s, most in ((10 * DAY_S + 7200, 30), (17 * DAY_S - 600, 4)):
        minute = minutes.ago(len(load) - at_s - 1)
        assert minutes.needs[minute] > 8.0
        assert 3 <= (minutes.needs[minute - 20 : minute + 20] > 8.0).sum() <= most
    assert (minutes.needs > 8.0).sum() <= 34


@pytest.mark.parametrize("piece_s", [5, 60, 77])
def test_it_does_not_matter_in_which_pieces_seconds_leave(piece_s: int) -> None:
    load = np.random.default_rng(1).gamma(2.0, 1.0, 3 * HOUR_S + 41)
    whole, pieces = kept(load, len(load)), kept(load, piece_s)
    assert whole.minutes == pytest.approx(pieces.minutes)
    assert whole.seconds.tolist() == pieces.seconds.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_with_as_many_instances_as_a_minute_needs_no_request_of_it_waits_longer_than_it_can(seed: int) -> None:
    dice = np.random.default_rng(seed)
    load = dice.gamma(0.2, 20.0, 60)
    (_, (need,)) = by_minute(load, SLACK_S)
    backlog, longest_s = 0.0, 0.0
    for second in load:
        backlog = max(0.0, backlog + second - need)
        longest_s = max(longest_s, backlog / need)
    # The lengths of stretches are not all tried.
    assert longest_s <= 1.5 * SLACK_S
    assert need >= load.mean()


def test_what_was_presumed_before_anything_was_seen_is_not_added() -> None:
    long = kept(np.full(600, 5.0), 7, nothing_before(540))
    assert long.minutes.shape == (2, 1)
    assert long.known_s == 0


@pytest.mark.parametrize("away_s", [0.0, 95.0, 7 * HOUR_S])
def test_after_a_restart_each_moment_keeps_its_time_of_day(away_s: float) -> None:
    """A peak was 24 hours ago; the last hour is told again as if it had just been."""
    load = peaks(DAY_S + HOUR_S, [HOUR_S])
    cut = len(load) - round(away_s) if away_s else len(load)
    before, hour = load[: cut - HOUR_S], load[cut - HOUR_S : cut]
    long = resumed(kept(before), hour, away_s, SLACK_S)
    hour = hour if away_s < HOUR_S else NONE
    assert [foretold_now(long, hour, SLACK_S, DAY_S + shift, 30.0) > 8.0 for shift in (-900, -240, 0, 240, 900)] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_moment_ago_and_now_tell_the_same() -> None:
    """The fleet that a backtest has ready in a second is the one that is asked for a start before it."""
    load = peaks(8 * HOUR_S, [h * HOUR_S + 1500 for h in range(8)])
    past = load[: 7 * HOUR_S + 1800]
    long, hour = kept(past[:-HOUR_S]), past[-HOUR_S:]
    told = foretold(all_minutes(long, hour, SLACK_S), HOUR_S, 65.0, HOUR_S)
    busy = 600 + np.flatnonzero(told[600:] > 8.0)  # What it had for the surge before is gone by then.
    surge = len(hour) - 300
    assert surge - 120 <= busy[0] <= surge - 1
    assert busy[-1] == len(hour) - 1
    assert (told[surge : surge + 180] > 8.0).all()
    now = [
        foretold_now(kept(load[: end - HOUR_S]), load[end - HOUR_S : end], SLACK_S, HOUR_S, 65.0)
        for end in range(7 * HOUR_S + 1300, 7 * HOUR_S + 2000, 20)
    ]
    asked = [7 * HOUR_S + 1300 + 20 * i for i, each in enumerate(now) if each > 8.0]
    assert 65 <= 7 * HOUR_S + 1500 - asked[0] <= 65 + 180, "a start ahead"


@pytest.mark.parametrize("hours", [1, 3, 17 * 24])
def test_the_few_minutes_that_a_tick_looks_at_are_those_of_the_whole(hours: int) -> None:
    load = np.random.default_rng(hours).gamma(0.5, 4.0, hours * HOUR_S + 47)
    long, hour = kept(load[:-HOUR_S]), load[-HOUR_S:]
    minutes = all_minutes(long, hour, SLACK_S)
    for period_s in (1860, HOUR_S, 2 * HOUR_S + 1860, DAY_S, 2 * DAY_S + HOUR_S, 3 * DAY_S):
        first, last = minutes.ago(period_s + 60), minutes.ago(period_s - 65.0 - 60)
        part = minutes.needs[max(0, first) : max(0, last + 1)]
        assert foretold_now(long, hour, SLACK_S, period_s, 65.0) == (part.max() if len(part) else 0.0)


def test_periods_are_found_and_none_in_what_has_none() -> None:
    hourly = peaks(9 * HOUR_S, [h * HOUR_S + 600 for h in range(9)])
    noise = np.random.default_rng(3).gamma(2.0, 0.5, 9 * HOUR_S)
    wave = 3.0 + np.sin(np.arange(9 * HOUR_S) * 2 * np.pi / (4 * HOUR_S))

    def found(load: Floats) -> tuple[int, ...]:
        minutes = all_minutes(kept(load), NONE, SLACK_S)
        return recurrences(minutes, len(minutes.means))

    assert HOUR_S in found(hourly + 0.1 * noise)
    assert 6 * HOUR_S in found(peaks(10 * HOUR_S, [600, 4000, 9000, 22_200, 25_600, 30_600])), "one and two thirds"
    assert found(noise) == ()
    assert found(hourly[: HOUR_S + 300]) == (), "one that was not seen twice"
    assert len(found(wave)) <= 1
    assert DAY_S in found(np.concatenate((np.tile(noise, 3),)))


def look(instances: float, *, missed: float = 0.0) -> Look:
    return Look(
        found=Headroom(rule=CONSTANT, h=1.0, instances=instances),
        instances=instances,
        missed=missed,
        requests=1000.0,
    )


def judged(with_it: list[Look], without: list[Look], known: Recurrence | None = None) -> list[int]:
    """The period in force after each look."""
    known, found = known or Recurrence(), []
    for one, none in zip(with_it, without, strict=True):
        known = looked(known, {HOUR_S: one, 0: none}, 0.006)
        found.append(known.period_s)
    return found


def test_a_period_is_adopted_once_it_has_saved_a_tenth_in_looks_enough_and_goes_when_it_costs() -> None:
    found = judged([look(4.0)] * 12 + [look(14.0)] * 30, [look(10.0)] * 42)
    assert found[:8] == [0] * 8
    assert found[8:12] == [HOUR_S] * 4
    assert found[-1] == 0
    assert not any(judged([look(9.5)] * 20, [look(10.0)] * 20)), "half a tenth is noise"
    assert not any(judged([look(10.0)] * 20, [look(10.0)] * 20)), "it has made no difference"


def test_a_timetable_that_moved_is_dropped_within_a_week_however_long_it_was_believed() -> None:
    known, found = Recurrence(), []
    for day in range(14 + 8):
        known = aged(known, float(DAY_S))
        for _ in range(6):  # An event is in six looks.
            known = looked(known, {DAY_S: look(4.0 if day < 14 else 14.0), 0: look(10.0)}, 0.006)
        found.append(known.period_s)
    assert found[2:14] == [DAY_S] * 12
    assert found[15] == DAY_S, "one day without it is an exception"
    assert found[14 + 7] == 0


def test_records_age_by_the_time_between_looks_whether_or_not_a_period_says_anything() -> None:
    ours, live, now_s = ChironSettings(), model(fleet_of(3)), 20.0 * DAY_S
    record = Record(period_s=DAY_S, without=90.0, within=40.0, looks=12, missed=3.0, requests=5000.0)
    memory = replace(
        first_memory(ours, live, now_s),
        history=remembered(now_s - HOUR_S, np.ones(HOUR_S), np.ones((1, HOUR_S))),
        recurrence=Recurrence(records=(record, Record(period_s=0)), period_s=DAY_S),
        backtest_s=now_s - 60.0,
        look_s=now_s - DAY_S,
    )
    asked = backtested(ours, memory, live, now_s)
    assert asked.backtest is not None
    aged_record = asked.recurrence.records[0]
    assert 0.85 < aged_record.without / record.without < 0.9
    assert (aged_record.saves, aged_record.misses, aged_record.looks) == pytest.approx(
        (record.saves, record.misses, record.looks)
    )


def test_a_period_that_lets_requests_miss_is_not_adopted_unless_having_none_does_too() -> None:
    assert not any(judged([look(4.0, missed=20.0)] * 20, [look(10.0)] * 20))
    assert judged([look(4.0, missed=20.0)] * 20, [look(10.0, missed=25.0)] * 20)[-1] == HOUR_S


def test_a_period_may_let_no_more_wait_too_long_than_those_leave_that_miss_their_itl() -> None:
    ours, live, now_s = ChironSettings(miss_max=0.008), model(fleet_of(3)), 20.0 * DAY_S
    load = np.ones(HOUR_S)
    question = Question(
        load=load, counts=load[None, :], slack_s=(SLACK_S,), rules=(CONSTANT,), cold_start_s=60.0, tick_s=5.0,
        miss_max=0.008, floor=1, ceiling=50, current=None,
    )  # fmt: skip
    record = Record(period_s=DAY_S, without=90.0, within=40.0, looks=12, missed=30.0, requests=5000.0)
    memory = replace(
        first_memory(ours, live, now_s),
        recurrence=Recurrence(records=(record, Record(period_s=0)), period_s=DAY_S),
        looks=tuple((period_s, Backtest(question=question)) for period_s in (0, DAY_S)),
    )
    assert backtested(ours, memory, live, now_s).recurrence.period_s == DAY_S
    assert backtested(ours, replace(memory, itl_missed=0.005), live, now_s).recurrence.period_s == 0


def test_records_are_bounded_and_having_none_is_always_among_them() -> None:
    known = Recurrence()
    for period in range(100):
        known = looked(known, {3600 + 60 * period: look(4.0), 0: look(10.0)}, 0.006)
    assert len(known.records) == 8
    assert known.records[-1].period_s == 0


def test_what_is_missed_is_that_of_the_last_seconds_with_an_earlier_headroom() -> None:
    load = peaks(HOUR_S, [600, HOUR_S - 300])
    question = Question(
        load=load, counts=np.ones((1, HOUR_S)), slack_s=(SLACK_S,), rules=(CONSTANT,), cold_start_s=60.0, tick_s=5.0,
        miss_max=0.006, floor=1, ceiling=50, current=None,
    )  # fmt: skip
    least = Headroom(rule=CONSTANT, h=2.0, instances=2.0)
    late, requests = missed(question, least, 600)
    assert requests == 600
    # Nine arrive where two are served: but for what may wait, seven of nine are late in its three minutes.
    assert late == pytest.approx((180 - SLACK_S * 2 / 7) * 7 / 9, abs=1.0)
    told = replace(question, foretold=np.where(load > 8.0, 9.0, 0.0))
    assert missed(told, least, 600) == (0.0, 600.0)


@pytest.mark.parametrize("away_s", [0.0, 600.0, 3 * HOUR_S])
def test_two_weeks_and_the_period_in_force_outlive_a_restart(away_s: float) -> None:
    ours = ChironSettings()
    memory = first_memory(ours, model(fleet_of(3)), 20.0 * DAY_S)
    load = peaks(15 * DAY_S, [14 * DAY_S + round(away_s) + 1800])
    history = remembered(20.0 * DAY_S - HOUR_S, load[-HOUR_S:], np.ones((1, HOUR_S)))
    record = Record(period_s=DAY_S, without=90.0, within=40.0, looks=12, missed=1.0, requests=5000.0)
    memory = replace(
        memory,
        history=history,
        long=kept(load[:-HOUR_S]),
        recurrence=Recurrence(records=(record, Record(period_s=0)), period_s=DAY_S),
    )
    told = json.loads(json.dumps(learned_load(memory, (CHAT,))))
    assert len(json.dumps(told)) < 150_000
    notes: list[str] = []
    again = restored_load(ours, Kept(told, "m", notes), (CHAT,), 5.0, away_s)
    assert notes == []
    assert again is not None
    assert again.recurrence == memory.recurrence
    assert again.history.seconds == (HOUR_S if away_s <= HOUR_S else 0)
    if not again.history.seconds:  # Stopped again before the first tick.
        again = restored_load(ours, Kept(learned_load(again, (CHAT,)), "m", notes), (CHAT,), 5.0, 0.0)
        assert notes == []
        assert again is not None
    live = model(fleet_of(3))
    again = begun(ours, again, live, 5.0)
    assert again.history.seconds >= 600, "a fleet that was found is taken as right"
    ahead = [recurring_to(ours, replace(again, long=again.long.after(np.zeros(0), 4.0)), live)]
    for _ in range(3):
        # Ten minutes without a request go by, three times; the peak of yesterday comes after the third.
        history = again.history.after(600, worth(TIMES, [200.0], 1.0), (), ["chat"])
        left, history = history.load[: max(0, history.seconds - HOUR_S)], history.last(HOUR_S)
        again = replace(again, history=history, long=again.long.after(left, SLACK_S))
        ahead.append(recurring_to(ours, again, live))
    assert [each > 8.0 for each in ahead] == [False, False, False, True]


def test_a_class_that_may_wait_for_ever_has_its_weeks_kept_and_its_surges_foretold() -> None:
    ours, patient = ChironSettings(), RequestClass(name="patient", kind="interactive", itl_s=0.2)
    live = model(fleet_of(3), mixes=(mix(patient),))
    record = Record(period_s=DAY_S, without=90.0, within=40.0, looks=12)
    load = peaks(2 * DAY_S, [DAY_S + 1800])
    memory = replace(
        first_memory(ours, live, 2.0 * DAY_S),
        history=remembered(0.0, load, np.ones((1, len(load)))),
        long=nothing_before(0),
        recurrence=Recurrence(records=(record,), period_s=DAY_S),
    )
    memory = remember(ours, memory, live, 2.0 * DAY_S, 1.0)

    notes: list[str] = []
    again = restored_load(ours, Kept(learned_load(memory, (patient,)), "m", notes), (patient,), 0.0, 1800.0)

    assert notes == []
    assert again is not None
    assert again.long.minutes.shape[1] > MINUTES_MAX - 15
    assert recurring_to(ours, again, live) > 8.0


@pytest.mark.parametrize("min_instances", [0, 1])
def test_a_surge_that_was_foretold_is_planned_for_after_hours_without_a_request(min_instances: int) -> None:
    ours, ahead_s = ChironSettings(), 30
    load = np.zeros(2 * DAY_S)
    load[DAY_S + ahead_s : DAY_S + ahead_s + 180] = 9.0  # A day before what comes in 30 s, and nothing since.
    live = model(fleet_of(min_instances), min_instances=min_instances)
    memory = replace(
        first_memory(ours, live, 2.0 * DAY_S),
        history=remembered(2.0 * DAY_S - HOUR_S, load[-HOUR_S:], np.zeros((1, HOUR_S))),
        long=kept(load[:-HOUR_S]),
    )

    def planned(memory: ModelMemory) -> int:
        plan, _ = decide_fleet(ours, {"llama": memory}, fleet(live, now_s=2.0 * DAY_S))
        return int(plan["llama"].counts["mixed"])

    record = Record(period_s=DAY_S, without=90.0, within=40.0, looks=12)
    assert planned(replace(memory, recurrence=Recurrence(records=(record,), period_s=DAY_S))) == 9
    assert planned(memory) == min_instances


@pytest.mark.parametrize("known_s", [None, HOUR_S])
def test_stopped_again_before_the_first_tick_the_time_away_is_counted_each_time(known_s: int | None) -> None:
    ours, away_s = ChironSettings(), (2 * HOUR_S, 1800)
    load = peaks(2 * DAY_S, [DAY_S + sum(away_s)])  # The surge was a day ago by the second start.
    memory = replace(
        first_memory(ours, model(fleet_of(3)), 2.0 * DAY_S),
        history=remembered(2.0 * DAY_S - HOUR_S, load[-HOUR_S:], np.ones((1, HOUR_S))),
        long=kept(load[:-HOUR_S]),
    )
    notes: list[str] = []
    for seconds in away_s:
        told = learned_load(memory, (CHAT,))
        if "load" not in told and known_s is not None:  # As it may have been written.
            told["long"]["known_s"] = known_s
        again = restored_load(ours, Kept(told, "m", notes), (CHAT,), 5.0, float(seconds))
        assert again is not None
        memory = again
    assert notes == []
    found = [foretold_now(memory.long, NONE, SLACK_S, DAY_S + shift, 30.0) > 8.0 for shift in (-900, 0, 900)]
    assert found == [False, True, False]


@pytest.mark.slow
def test_an_hourly_surge_is_met_by_a_fleet_that_is_small_between() -> None:
    """Six hours, tick by tick, with what the policy has learned by itself; once forgetful, once not."""
    ours = ChironSettings(tick_s=10.0, backtest_s=600.0)
    surges = [h * HOUR_S + 1900 for h in range(6)]
    load = peaks(6 * HOUR_S, surges, lasts_s=120)
    # As many requests as make about one instance's worth of work.
    requests = np.random.default_rng(1).poisson(6.0 * load)

    def planned(settings: ChironSettings) -> Floats:
        state, counts = None, []
        live = model(fleet_of(3), max_instances=40)
        for now in range(10, 6 * HOUR_S, 10):
            seen = tuple(arrival(s, int(requests[s])) for s in range(now - 10, now) if requests[s])
            view = replace(live, arrivals=seen)
            plan, state = decide_fleet(settings, state, fleet(view, now_s=float(now), since_s=10.0))
            while (further := prepare(settings, state)) is not None:
                state = further
            wanted = int(plan["llama"].numbers["wanted"])
            counts.append(wanted)
            live = model(fleet_of(wanted), max_instances=40)
        assert state is not None
        assert len(str(learned_load(state["llama"], (CHAT,)))) < 150_000
        return np.array(counts, dtype=float)

    last = slice(5 * 360, 6 * 360)
    knows, forgets = planned(ours)[last], planned(replace(ours, look_back=False))[last]
    at = [(s - 5 * HOUR_S) // 10 for s in surges[5:]]
    for begins in at:
        assert knows[begins - 7] >= 0.9 * knows[begins : begins + 12].max(), "a start ahead"
    assert knows.mean() < 0.8 * forgets.mean()


@pytest.mark.parametrize(("away_s", "count", "reason"), [(0.0, 1, "load_fell"), (1800.0, 10, "hold_before_down")])
def test_who_was_away_sees_for_a_while_what_comes_before_the_fleet_shrinks(
    away_s: float, count: int, reason: str
) -> None:
    ours = ChironSettings()
    memory = replace(
        first_memory(ours, model(fleet_of(1)), 2.0 * DAY_S),
        history=remembered(2.0 * DAY_S - HOUR_S, np.full(HOUR_S, 0.5), np.ones((1, HOUR_S))),
    )
    again = restored_load(ours, Kept(learned_load(memory, (CHAT,)), "m", []), (CHAT,), 0.0, away_s)
    assert again is not None
    live = model(fleet_of(10))
    plans, state = decide_fleet(ours, {"llama": again}, fleet(live, now_s=5.0))
    assert (plans["llama"].counts["mixed"], plans["llama"].reason) == (count, reason)
    plans, _ = decide_fleet(ours, state, fleet(live, now_s=5.0 + ours.hold_s, since_s=ours.hold_s))
    assert plans["llama"].counts["mixed"] == 1


def test_what_misses_its_itl_is_known_after_a_restart_as_it_was() -> None:
    ours = ChironSettings()
    memory = replace(
        first_memory(ours, model(fleet_of(1)), 2.0 * DAY_S),
        history=remembered(2.0 * DAY_S - HOUR_S, np.ones(HOUR_S), np.ones((1, HOUR_S))),
    )
    for share in (None, 0.001):
        told = learned_load(replace(memory, itl_missed=share), (CHAT,))
        again = restored_load(ours, Kept(json.loads(json.dumps(told)), "m", []), (CHAT,), 0.0, 0.0)
        assert again is not None
        assert again.itl_missed == share
