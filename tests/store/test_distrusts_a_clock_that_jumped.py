"""A start with a wrong clock takes nothing for old: what nobody saw pass does not count until the clock has proved
itself. The machine's clock, the store and the batch runner are real but for time, which is virtual."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from batch_runner_site import TUNING, Clock, Site, many
from chiron.gateway.batch.settings import RunnerSettings
from chiron.store.port import Batch
from chiron.store.trusted_clock import ClockMarks, begin, look, words
from gateway_site import line

HOUR_S, DAY_S = 3600.0, 86_400.0
GAP = {"gap_s": HOUR_S, "grace_s": DAY_S}


def test_time_that_a_process_saw_pass_is_trusted() -> None:
    marks = begin(ClockMarks(), 1000.0, **GAP)
    marks = look(marks, 1000.0 + 40 * DAY_S, was_set=False)
    assert (marks.due_s, marks.doubt_s, words(marks)) == (1000.0 + 40 * DAY_S, 0.0, "")


def test_a_restart_within_the_hour_is_trusted() -> None:
    marks = begin(ClockMarks(seen_s=1000.0, trusted_s=1000.0), 1000.0 + HOUR_S, **GAP)
    assert (marks.due_s, marks.doubt_s) == (1000.0 + HOUR_S, 0.0)


@pytest.mark.parametrize("jump_s", [31 * DAY_S, 2 * HOUR_S])
def test_a_jump_forwards_counts_only_once_the_clock_has_run(jump_s: float) -> None:
    marks = begin(ClockMarks(seen_s=1000.0, trusted_s=1000.0), 1000.0 + jump_s, **GAP)
    assert marks.due_s == 1000.0
    grace_s = min(jump_s, DAY_S)
    marks = look(marks, 1000.0 + jump_s + grace_s - 1.0, was_set=False)
    assert marks.due_s == 1000.0 + grace_s - 1.0
    assert "ahead" in words(marks)
    marks = look(marks, 1000.0 + jump_s + grace_s, was_set=False)
    assert (marks.due_s, words(marks)) == (1000.0 + jump_s + grace_s, "")


def test_restarts_do_not_end_a_doubt_and_only_running_does() -> None:
    marks = begin(ClockMarks(seen_s=0.0, trusted_s=0.0), 31 * DAY_S, **GAP)
    now_s = 31 * DAY_S
    for _ in range(100):
        marks = begin(marks, now_s, **GAP)
        now_s += 60.0
        marks = look(marks, now_s, was_set=False)
        now_s += 120.0
    assert marks.doubt_s == DAY_S - 100 * 60.0
    assert marks.due_s < DAY_S


def test_a_clock_that_was_set_meanwhile_proves_nothing() -> None:
    marks = begin(ClockMarks(seen_s=0.0, trusted_s=0.0), 31 * DAY_S, **GAP)
    marks = look(marks, 40 * DAY_S, was_set=True)
    assert marks.doubt_s == DAY_S
    assert marks.due_s == 9 * DAY_S


def test_a_clock_set_right_again_is_trusted_at_once() -> None:
    marks = begin(ClockMarks(seen_s=0.0, trusted_s=0.0), 31 * DAY_S, **GAP)
    marks = look(marks, 31 * DAY_S + 600.0, was_set=False)
    marks = begin(marks, 700.0, **GAP)
    assert (marks.due_s, marks.doubt_s) == (700.0, 0.0)


def test_a_jump_backwards_is_told_and_deletes_nothing() -> None:
    marks = begin(ClockMarks(seen_s=40 * DAY_S, trusted_s=40 * DAY_S), DAY_S, **GAP)
    assert marks.due_s == DAY_S
    assert "behind" in words(marks)
    # And back again: what it showed in between is forgotten.
    marks = begin(marks, 40 * DAY_S + 60.0, **GAP)
    assert (marks.due_s, marks.doubt_s) == (40 * DAY_S + 60.0, 0.0)


class Jumped(Clock):
    """A clock that shows another date from the start on."""

    def __init__(self, ahead_s: float) -> None:
        super().__init__()
        self.ahead_s = ahead_s

    def wall_s(self, when_s: float) -> float:
        return super().wall_s(when_s) + self.ahead_s

    def from_wall_s(self, wall_s: float) -> float:
        return super().from_wall_s(wall_s) - self.ahead_s


async def started(directory: Path, ahead_s: float, answer: Callable[[str], str | None] = str.upper) -> Site:
    site = Site(directory, answer, tuning=TUNING)
    site.clock = site.plane.clock = Jumped(ahead_s)
    return await site.start()


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))  # type: ignore[arg-type]


def test_a_start_31_days_ahead_deletes_and_expires_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def prepare() -> tuple[Batch, Batch]:
        site = await started(tmp_path, 0.0, lambda text: text if "quick" in text else None)
        done = await site.ended(await site.submit(*many(3, "quick")))
        open_ = await site.submit(*many(4, "slow"))
        await site.until(lambda: len(site.plane.open) == 4)
        await site.stop()
        return done, open_

    async def test() -> None:
        done, open_ = await prepare()
        with caplog.at_level(logging.WARNING, "chiron.batch"):
            site = await started(tmp_path, 31 * DAY_S)
            assert (await site.ended(open_)).status == "completed", "it is not late, it only looks so"
            await site.until(lambda: site.clock.now_s > 1300.0, step_s=10.0)
            assert (await site.store.get_batch(done.id, None)).status == "completed"
            assert len(await site.lines(done.output_file_id)) == 3
            assert len(await site.store.list_files(None)) == 4
            assert "31 days ahead" in str(site.runner.summary()["clock"])
            assert "31 days ahead" in caplog.text
            await site.stop()
        # Switched off for 31 days, and a day later all is as it would have been.
        site = await started(tmp_path, 31 * DAY_S + 1400.0)
        site.clock.run_until(DAY_S + 1.0)
        await site.until(lambda: not site.runner.summary()["clock"])

        async def swept() -> bool:
            return [batch.id for batch in await site.store.list_batches(None)] == [open_.id]

        await site.until(swept, step_s=300.0)
        await site.stop()

    run(test())


def test_a_batch_that_came_while_the_clock_was_in_doubt_expires_as_it_should(tmp_path: Path) -> None:
    async def test() -> None:
        site = await started(tmp_path, 0.0)
        await site.ended(await site.submit(line("a")))
        await site.stop()
        site = await started(tmp_path, -2 * DAY_S, lambda text: None)
        batch = await site.submit(line("b"), window_s=60.0)
        await site.until(lambda: site.plane.open)
        assert (await site.ended(batch, step_s=1.0)).status == "expired"
        await site.stop()

    run(test())


@pytest.mark.parametrize("name", ["clock_gap_s", "clock_grace_s", "clock_keep_s"])
def test_settings_that_make_no_sense_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        RunnerSettings(**{name: 0.0})
