"""A kind that keeps failing is started less and less often, one at a time, and said to be crash-looping."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest

from chiron.fleet.starts import BackoffSettings, StartDelayedError, Starts, backoff_s
from fleet_factory import an_instance, kill, local_fleet, quick_settings, starts_of, stub_kind, until
from virtual_loop import run_virtual


def test_the_pause_doubles_up_to_its_limit_and_a_crash_loop_takes_the_limit() -> None:
    settings = BackoffSettings(backoff_first_s=1.0, backoff_max_s=60.0, crash_loop_starts=9)
    assert [backoff_s(settings, failures) for failures in range(9)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert backoff_s(BackoffSettings(crash_loop_starts=5), 5) == 60.0
    assert backoff_s(BackoffSettings(crash_loop_starts=10**6), 10**5) == 60.0


def test_settings_out_of_range_name_the_field_and_the_value() -> None:
    with pytest.raises(ValueError, match="backoff_first_s is -1"):
        BackoffSettings(backoff_first_s=-1.0)


def test_failures_of_starts_that_were_under_way_together_count_once() -> None:
    async def story() -> None:
        starts = Starts(BackoffSettings(backoff_first_s=1000.0, backoff_max_s=1000.0))
        now_s = asyncio.get_running_loop().time()
        for _ in range(10):
            starts.failed(began_s=now_s, ready_s=None, reason="no memory")
        assert starts.failures == 1
        assert starts.status().failures_total == 10
        assert starts.status().state == "backing-off"
        assert 900.0 < starts.status().next_start_in_s <= 1000.0

    asyncio.run(story())


def test_an_instance_that_lasted_is_replaced_at_once() -> None:
    async def story() -> None:
        starts = Starts(BackoffSettings(stable_after_s=60.0, backoff_first_s=1000.0, backoff_max_s=1000.0))
        now_s = asyncio.get_running_loop().time()
        starts.failed(began_s=now_s - 100.0, ready_s=now_s - 61.0, reason="a bit flipped")
        assert starts.status().state == "ok"
        await asyncio.wait_for(starts.turn("next"), 60.0)
        starts.failed(began_s=now_s, ready_s=now_s, reason="died young")
        assert starts.status().state == "backing-off"
        starts.lasted()
        assert starts.status().state == "ok"

    asyncio.run(story())


def test_after_a_failure_one_start_is_tried_and_the_others_follow_its_success() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        starts = Starts(BackoffSettings(backoff_first_s=0.05))
        starts.failed(began_s=loop.time(), ready_s=None, reason="no memory")
        turns = [loop.create_task(starts.turn(number)) for number in range(3)]
        await until(turns[0].done, "the first is tried")
        await asyncio.sleep(0.1)
        assert [turn.done() for turn in turns] == [True, False, False]
        starts.over(0)  # It was removed: the next one is tried.
        await until(turns[1].done, "the second is tried")
        assert not turns[2].done()
        starts.succeeded(1)
        await until(turns[2].done, "the third follows")

    run_virtual(story())


def test_a_start_whose_turn_does_not_come_is_given_up_with_the_reason() -> None:
    async def story() -> None:
        starts = Starts(BackoffSettings(backoff_first_s=0.05, start_wait_s=0.2))
        starts.failed(began_s=asyncio.get_running_loop().time(), ready_s=None, reason="no memory")
        await starts.turn("trial")
        with pytest.raises(StartDelayedError, match=r"waited 0\.2 s for its turn: no memory"):
            await starts.turn("waits in vain")

    run_virtual(story())


@pytest.mark.slow
def test_a_crash_loop_slows_down_is_named_and_heals(tmp_path: Path) -> None:
    async def story() -> None:
        settings = quick_settings(crash_loop_starts=3)
        async with local_fleet(tmp_path, {"stub": stub_kind("--exit-code", "9")}, settings) as (fleet, heard):
            began = []
            for number in range(1, 5):  # As the control plane does: a new one for each that failed.
                assert starts_of(fleet).state == ("ok", "backing-off", "backing-off", "crash-looping")[number - 1]
                fleet.create(an_instance(number))
                record = fleet._records._records[number]
                await until(lambda n=number: heard.failed == list(range(1, n + 1)), "failed")
                began.append(record.began_s)
            status = starts_of(fleet)
            assert "out of luck" in status.reason
            assert status.failures_total == 4
            gaps = [after - before for before, after in pairwise(began)]
            assert all(gap > pause_s for gap, pause_s in zip(gaps, (0.1, 0.2, 0.4), strict=True)), gaps
            fleet._sources["stub"] = stub_kind()
            fleet.create(an_instance(5))
            await until(lambda: heard.ready == [5], "ready")
            await until(lambda: starts_of(fleet).state == "ok", "it has lasted")

    asyncio.run(story())


def test_an_engine_that_dies_soon_after_it_was_ready_backs_off_too(tmp_path: Path) -> None:
    async def story() -> None:
        settings = quick_settings(stable_after_s=60.0)
        async with local_fleet(tmp_path, {"stub": stub_kind("--crash-after", "2")}, settings) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.failed == [1], "failed")
            assert heard.ready == [1]
            assert "SIGABRT" in heard.reasons[1]
            assert starts_of(fleet).state == "backing-off"

    asyncio.run(story())


def test_a_kind_in_trouble_does_not_hold_up_another(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {"bad": stub_kind("--exit-code", "9"), "good": stub_kind()}
        async with local_fleet(tmp_path, kinds, quick_settings(backoff_first_s=600.0, backoff_max_s=600.0)) as (
            fleet,
            heard,
        ):
            fleet.create(an_instance(1, "bad"))
            await until(lambda: heard.failed == [1], "failed")
            fleet.create(an_instance(2, "bad"))
            fleet.create(an_instance(3, "good"))
            await until(lambda: heard.ready == [3], "the good one is ready")
            assert heard.failed == [1]
            kill(next(usage.pid for usage in await _usage(fleet)))
            await until(lambda: heard.failed == [1, 3], "killed")

    asyncio.run(story())


async def _usage(fleet):  # type: ignore[no-untyped-def]
    await until(lambda: fleet.report().usage, "usage")
    return fleet.report().usage.values()
