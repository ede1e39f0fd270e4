"""Engine processes sleep instead of being stopped and wake instead of being started; whatever they do wrong, all is
then as it is without sleepers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from child_processes import children
from chiron.fleet.port import FleetEnvironment
from chiron.fleet.process.engine_process import EngineExitedError, EngineProcess
from chiron.fleet.process.fleet import ProcessFleet
from chiron.fleet.process.sleepers import HostedEngine, ProcessSleepers
from chiron.fleet.settings import SleeperSettings
from chiron.fleet.union import UnionFleet
from chiron.net.client import Origin
from chiron.net.clock import LiveClock
from fleet_factory import (
    QUICK_HEALTH,
    Heard,
    alive,
    an_instance,
    kill,
    local_fleet,
    quick_settings,
    sleeping_kind,
    stub_kind,
    until,
)

ROOM = SleeperSettings(host_memory_gb=100.0)
SHORT = SleeperSettings(host_memory_gb=100.0, fall_asleep_timeout_s=0.3, wake_timeout_s=0.3)
"""For engines that hang."""


def first_quick(first: str, *others: str) -> list[object]:
    """The first one in every run, the others in slow ones."""
    return [first, *(pytest.param(each, marks=pytest.mark.slow) for each in others if each != first)]


async def pid_of(fleet: ProcessFleet, number: int) -> int:
    await until(lambda: number in fleet.report().usage, "its process is known")
    return fleet.report().usage[number].pid


async def ready(fleet: ProcessFleet, heard: Heard, number: int, kind: str = "stub") -> int:
    """Create one; the engine's process once it is ready."""
    instance = an_instance(number, kind)
    heard.clock.post(lambda: fleet.create(instance))
    await until(lambda: number in heard.ready, f"{number} is ready")
    return await pid_of(fleet, number)


async def asleep(fleet: ProcessFleet | UnionFleet, heard: Heard, number: int, kind: str = "stub") -> None:
    heard.clock.post(lambda: fleet.sleep(an_instance(number, kind)))
    assert number not in heard.asleep, "a port's calls do not answer at once"
    await until(lambda: number in heard.asleep, f"{number} has left its GPUs")


def test_models_take_turns_on_one_gpu_and_keep_their_processes(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {name: sleeping_kind(gpus=1) for name in ("a", "b")}
        async with local_fleet(tmp_path, kinds, devices=("0",), sleepers=ROOM) as (fleet, heard):
            assert fleet.sleeping_kinds == {"a", "b"}
            first = await ready(fleet, heard, 1, "a")
            await asleep(fleet, heard, 1, "a")
            assert fleet.devices.free == 1, "its GPU is free"
            await until(lambda: heard.sleepers == {"a": 1}, "it is counted")
            second = await ready(fleet, heard, 2, "b")
            third = an_instance(3, "a")
            heard.clock.post(lambda: fleet.create(third))
            await asyncio.sleep(0.05)
            assert 3 not in heard.ready, "the GPU on which it would wake is in use"
            await asleep(fleet, heard, 2, "b")
            await until(lambda: 3 in heard.ready, "it wakes")
            assert third.source == "memory"
            assert await pid_of(fleet, 3) == first
            assert fleet.log_path(third) == tmp_path / "org_model-1.log", "it goes on writing there"
            origin = Origin(heard.urls[3])
            assert (await origin.fetch("GET", "/is_sleeping")).body == b'{"is_sleeping": false}'
            await origin.close()
            await until(lambda: heard.sleepers == {"b": 1}, "the other one is counted")
            assert alive(second)
            status = fleet.report().kinds["a"].sleep
            assert status is not None
            assert (status.asleep, status.wakes, status.failed_sleeps, status.failed_wakes) == (0, 1, 0, 0)
            status = fleet.report().kinds["b"].sleep
            assert status is not None
            assert (status.asleep, status.memory_gb) == (1, 10.0)
            assert not heard.failed

    asyncio.run(story())


REFUSALS = {
    "it has no such route": (("--unknown", "/sleep?level=1"), "answers with status 404"),
    "it says that it is awake": (("--answer", "/is_sleeping", '{"is_sleeping": false}'), "says that it is awake"),
    "it talks nonsense": (("--answer", "/is_sleeping", "[]"), "does not say whether it sleeps"),
    "it talks deep nonsense": (("--answer", "/is_sleeping", "[" * 50_000), "does not say whether it sleeps"),
    "it hangs": (("--deaf", "DEAF"), "did not sleep within 0.3 s"),
}


@pytest.mark.parametrize("how", first_quick("it says that it is awake", *REFUSALS))
def test_one_that_does_not_fall_asleep_is_stopped_and_its_kind_is_left_alone(how: str, tmp_path: Path) -> None:
    async def story() -> None:
        switches, why = REFUSALS[how]
        deaf = tmp_path / "deaf"
        kind = sleeping_kind(*(word.replace("DEAF", str(deaf)) for word in switches), gpus=1)
        settings = SHORT if how == "it hangs" else ROOM
        async with local_fleet(tmp_path / "logs", {"stub": kind}, devices=("0",), sleepers=settings) as (fleet, heard):
            first = await ready(fleet, heard, 1)
            deaf.touch()
            await asleep(fleet, heard, 1)
            assert not alive(first)
            assert fleet.devices.free == 1
            status = fleet.report().kinds["stub"].sleep
            assert status is not None
            assert (status.asleep, status.failed_sleeps) == (0, 1)
            assert why in status.reason
            deaf.unlink()
            await ready(fleet, heard, 2)
            await asleep(fleet, heard, 2)
            status = fleet.report().kinds["stub"].sleep
            assert status is not None
            assert status.failed_sleeps == 1, "it was not even asked"
            assert not heard.failed
            assert not heard.sleepers

    asyncio.run(story())


@pytest.mark.parametrize("how", first_quick("it hangs", "it says that it sleeps", "it is killed"))
def test_one_that_does_not_wake_is_stopped_and_another_is_started(how: str, tmp_path: Path) -> None:
    async def story() -> None:
        deaf, liar = tmp_path / "deaf", tmp_path / "liar"
        kind = sleeping_kind("--deaf", str(deaf), "--insomnia", str(liar), gpus=1)
        # Nobody looks at sleepers before one is to wake.
        calm = replace(quick_settings(), health=replace(QUICK_HEALTH, health_period_s=600.0))
        short = SleeperSettings(host_memory_gb=100.0, wake_timeout_s=0.3)
        settings = short if how == "it hangs" else ROOM
        async with local_fleet(tmp_path / "logs", {"stub": kind}, calm, ("0",), settings) as (fleet, heard):
            first = await ready(fleet, heard, 1)
            await asleep(fleet, heard, 1)
            if how == "it hangs":
                deaf.touch()
            elif how == "it is killed":
                kill(first)
            else:
                liar.touch()
            second = an_instance(2)
            heard.clock.post(lambda: fleet.create(second))
            await until(lambda: not alive(first), "the sleeper is stopped")
            deaf.unlink(missing_ok=True)
            await until(lambda: heard.ready == [1, 2], "another is started")
            assert second.source == ""
            assert await pid_of(fleet, 2) != first
            status = fleet.report().kinds["stub"].sleep
            assert status is not None
            assert status.wakes == 0
            assert status.failed_wakes + status.lost == 1, "noticed before, or when it was to wake"
            assert not heard.failed

    asyncio.run(story())


@pytest.mark.parametrize("how", first_quick("it is killed", "somebody wakes it", "it hangs"))
def test_a_sleeper_that_is_of_no_use_any_more_is_stopped(how: str, tmp_path: Path) -> None:
    async def story() -> None:
        deaf = tmp_path / "deaf"
        kinds = {"stub": sleeping_kind("--deaf", str(deaf))}
        settings = quick_settings()
        if how == "it hangs":
            settings = replace(settings, health=replace(QUICK_HEALTH, health_timeout_s=0.1))
        async with local_fleet(tmp_path / "logs", kinds, settings, sleepers=ROOM) as (fleet, heard):
            first = await ready(fleet, heard, 1)
            await asleep(fleet, heard, 1)
            await until(lambda: heard.sleepers == {"stub": 1}, "it sleeps")
            if how == "it is killed":
                kill(first)
            elif how == "it hangs":
                deaf.touch()
            else:
                origin = Origin(heard.urls[1], keepalive=False)
                await origin.fetch("POST", "/wake_up")
                await origin.close()
            await until(lambda: heard.sleepers == {}, "it is told of")
            await until(lambda: not alive(first), "it is stopped")
            status = fleet.report().kinds["stub"].sleep
            assert status is not None
            assert (status.asleep, status.lost) == (0, 1)
            assert status.reason
            assert not heard.failed, "it was nobody's instance"

    asyncio.run(story())


def test_sleepers_keep_to_the_host_memory_and_kinds_with_more_of_them_give_way(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {"a": sleeping_kind(), "b": sleeping_kind(), "huge": sleeping_kind(gb=500.0)}
        room = SleeperSettings(host_memory_gb=25.0)
        async with local_fleet(tmp_path, kinds, sleepers=room) as (fleet, heard):
            assert fleet.sleeping_kinds == {"a", "b"}
            for number, kind in enumerate(("a", "a", "a", "b"), start=1):
                await ready(fleet, heard, number, kind)
            for number in (1, 2):
                await asleep(fleet, heard, number, "a")
            await until(lambda: heard.sleepers == {"a": 2}, "there is room for two")
            await asleep(fleet, heard, 3, "a")
            assert fleet.report().kinds["a"].sleep.asleep == 2, "the third is stopped"  # type: ignore[union-attr]
            await asleep(fleet, heard, 4, "b")
            await until(lambda: heard.sleepers == {"a": 1, "b": 1}, "one gives way")
            assert len(children()) == 2
            heard.clock.post(lambda: fleet.keep_asleep("a", 0))
            await until(lambda: heard.sleepers == {"b": 1}, "no more are wanted")
            await until(lambda: len(children()) == 1, "it is gone")

    asyncio.run(story())


@pytest.mark.slow
def test_several_that_fall_asleep_at_once_keep_to_the_host_memory(tmp_path: Path) -> None:
    async def story() -> None:
        room = SleeperSettings(host_memory_gb=25.0)
        async with local_fleet(tmp_path, {"stub": sleeping_kind()}, sleepers=room) as (fleet, heard):
            for number in range(1, 5):
                await ready(fleet, heard, number)

            def all_sleep() -> None:
                for number in range(1, 5):
                    fleet.sleep(an_instance(number))

            heard.clock.post(all_sleep)
            await until(lambda: sorted(heard.asleep) == [1, 2, 3, 4], "all have left")
            assert heard.sleepers == {"stub": 2}
            assert len(children()) == 2

    asyncio.run(story())


class Dead:
    """Stands for an ``EngineProcess``."""

    async def unless_exited(self, work: Coroutine[Any, Any, None]) -> None:
        work.close()
        raise EngineExitedError("it was killed by SIGKILL")


def test_to_die_of_falling_asleep_is_a_failure_to_sleep() -> None:
    async def story() -> None:
        source = sleeping_kind().sleep
        assert source is not None
        sleepers = ProcessSleepers({"stub": source}, ROOM, QUICK_HEALTH, lambda: None)
        engine = HostedEngine(
            kind="stub",
            process=cast(EngineProcess, Dead()),
            command=(),
            devices=(),
            log=Path("x"),
            resources=AsyncExitStack(),
        )
        assert await sleepers.put(engine) == "it was killed by SIGKILL"
        status = sleepers.status("stub")
        assert status is not None
        assert (status.failed_sleeps, status.asleep) == (1, 0)
        assert "sleeps no more" in await sleepers.put(engine)

    asyncio.run(story())


@pytest.mark.slow
def test_an_engine_that_dies_of_falling_asleep_is_not_asked_again_and_no_failed_start(tmp_path: Path) -> None:
    async def story() -> None:
        deaf = tmp_path / "deaf"
        kinds = {"stub": sleeping_kind("--deaf", str(deaf))}
        async with local_fleet(tmp_path / "logs", kinds, sleepers=ROOM) as (fleet, heard):
            first = await ready(fleet, heard, 1)
            deaf.touch()
            heard.clock.post(lambda: fleet.sleep(an_instance(1)))
            await asyncio.sleep(0.1)
            kill(first)
            await until(lambda: heard.failed + heard.asleep, "it is gone")
            await asyncio.sleep(0.1)
            assert (heard.failed, heard.asleep) == ([], [1])
            assert not heard.sleepers
            report = fleet.report().kinds["stub"]
            assert report.sleep is not None
            assert report.starts is not None
            assert (report.sleep.failed_sleeps, report.starts.failures_total) == (1, 0)

    asyncio.run(story())


STUBBORN = ("--ignore-sigterm",)
"""Takes as long as its stop timeout to end."""


def test_gpus_are_not_handed_out_before_a_sleeper_that_did_not_wake_has_ended(tmp_path: Path) -> None:
    async def story() -> None:
        liar = tmp_path / "liar"
        kind = sleeping_kind("--insomnia", str(liar), *STUBBORN, gpus=1, stop_timeout_s=0.5)
        calm = replace(quick_settings(), health=replace(QUICK_HEALTH, health_period_s=600.0))
        async with local_fleet(tmp_path / "logs", {"stub": kind}, calm, ("0",), ROOM) as (fleet, heard):
            first = await ready(fleet, heard, 1)
            await asleep(fleet, heard, 1)
            liar.touch()
            heard.clock.post(lambda: fleet.create(an_instance(2)))
            await until(lambda: fleet.report().kinds["stub"].sleep.failed_wakes, "it is stopped")  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
            heard.clock.post(lambda: fleet.remove(an_instance(2)))
            await until(lambda: fleet.devices.free, "the GPU is free")
            assert not alive(first)

    asyncio.run(story())


def test_an_engine_falls_asleep_once_those_have_ended_whose_host_memory_it_needs(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {"old": sleeping_kind(*STUBBORN, stop_timeout_s=0.5), "new": sleeping_kind()}
        room = SleeperSettings(host_memory_gb=15.0)
        async with local_fleet(tmp_path, kinds, sleepers=room) as (fleet, heard):
            first = await ready(fleet, heard, 1, "old")
            await ready(fleet, heard, 2, "new")
            await asleep(fleet, heard, 1, "old")
            heard.clock.post(lambda: fleet.keep_asleep("old", 0))
            await asleep(fleet, heard, 2, "new")
            assert not alive(first)
            await until(lambda: heard.sleepers == {"new": 1}, "it sleeps")

    asyncio.run(story())


@pytest.mark.slow
def test_an_engine_falls_asleep_once_those_are_awake_or_gone_whose_host_memory_it_needs(tmp_path: Path) -> None:
    async def story() -> None:
        deaf = tmp_path / "deaf"
        kinds = {"old": sleeping_kind("--deaf", str(deaf)), "new": sleeping_kind()}
        room = SleeperSettings(host_memory_gb=15.0, wake_timeout_s=0.5)
        async with local_fleet(tmp_path / "logs", kinds, sleepers=room) as (fleet, heard):
            first = await ready(fleet, heard, 1, "old")
            await ready(fleet, heard, 2, "new")
            await asleep(fleet, heard, 1, "old")
            deaf.touch()
            heard.clock.post(lambda: fleet.create(an_instance(3, "old")))
            await until(lambda: heard.sleepers == {}, "it wakes")
            await asleep(fleet, heard, 2, "new")
            assert not alive(first)
            deaf.unlink()
            await until(lambda: heard.sleepers == {"new": 1}, "it sleeps")

    asyncio.run(story())


def test_a_kind_whose_engine_fails_soon_after_it_woke_sleeps_no_more_for_a_while(tmp_path: Path) -> None:
    async def story() -> None:
        calm = replace(quick_settings(stable_after_s=600.0), health=replace(QUICK_HEALTH, health_period_s=600.0))
        async with local_fleet(tmp_path, {"stub": sleeping_kind()}, calm, sleepers=ROOM) as (fleet, heard):
            await ready(fleet, heard, 1)
            await asleep(fleet, heard, 1)
            kill(await ready(fleet, heard, 2))
            await until(lambda: heard.failed == [2], "it is told of")
            status = fleet.report().kinds["stub"].sleep
            assert status is not None
            assert (status.wakes, status.failed_wakes) == (1, 1)
            assert "soon after it woke" in status.reason
            await ready(fleet, heard, 3)
            await asleep(fleet, heard, 3)
            assert not heard.sleepers, "it was not even asked"

    asyncio.run(story())


@pytest.mark.slow
def test_sleepers_leave_gpus_on_which_another_engine_fails_to_start_again_and_again(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {"a": sleeping_kind(gpus=1), "b": stub_kind("--exit-code", "1", gpus=1)}
        async with local_fleet(tmp_path, kinds, devices=("0", "1"), sleepers=ROOM) as (fleet, heard):
            for number in (1, 2):
                await ready(fleet, heard, number, "a")
            for number in (1, 2):
                await asleep(fleet, heard, number, "a")
            heard.clock.post(lambda: fleet.create(an_instance(3, "b")))
            await until(lambda: heard.failed == [3], "it fails")
            assert heard.sleepers == {"a": 2}, "once may be chance"
            heard.clock.post(lambda: fleet.create(an_instance(4, "b")))
            await until(lambda: heard.sleepers == {"a": 1}, "the one on its GPU is stopped")
            status = fleet.report().kinds["a"].sleep
            assert status is not None
            assert (status.asleep, status.lost) == (1, 1)
            assert "'b'" in status.reason

    asyncio.run(story())


def test_nothing_is_left_of_a_fleet_that_closes_while_engines_fall_asleep_sleep_and_wake(tmp_path: Path) -> None:
    async def story() -> None:
        deaf = tmp_path / "deaf"
        kinds = {"stub": sleeping_kind(), "deaf": sleeping_kind("--deaf", str(deaf))}
        async with local_fleet(tmp_path / "logs", kinds, sleepers=ROOM) as (fleet, heard):
            await ready(fleet, heard, 1)
            await ready(fleet, heard, 2, "deaf")
            await ready(fleet, heard, 3, "deaf")
            await asleep(fleet, heard, 1)
            await asleep(fleet, heard, 2, "deaf")
            deaf.touch()
            heard.clock.post(lambda: fleet.sleep(an_instance(3, "deaf")))  # Hangs.
            heard.clock.post(lambda: fleet.create(an_instance(4, "deaf")))  # Hangs, too.
            await asyncio.sleep(0.1)
            await fleet.close()
            assert not children()
            assert heard.asleep == [1, 2]
            assert 4 not in heard.ready

    asyncio.run(story())


def test_a_start_goes_where_its_sleeper_is_and_others_stay_away_from_there(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {name: sleeping_kind(gpus=1) for name in ("a", "b")}
        async with local_fleet(tmp_path, kinds, devices=("0", "1"), sleepers=ROOM) as (fleet, heard):
            first = await ready(fleet, heard, 1, "a")  # On GPU 0.
            await asleep(fleet, heard, 1, "a")
            await ready(fleet, heard, 2, "b")
            woken = an_instance(3, "a")
            heard.clock.post(lambda: fleet.create(woken))
            await until(lambda: 3 in heard.ready, "the GPU of the sleeper was left free")
            assert woken.source == "memory"
            assert await pid_of(fleet, 3) == first
            for number, kind in ((2, "b"), (3, "a")):
                await asleep(fleet, heard, number, kind)
            other = an_instance(4, "b")
            heard.clock.post(lambda: fleet.create(other))
            await until(lambda: 4 in heard.ready, "ready")
            assert other.source == "memory", "GPU 1, although GPU 0 is free as well"

    asyncio.run(story())


@pytest.mark.slow
def test_a_sleeper_that_was_started_with_another_token_budget_is_not_woken(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {"stub": sleeping_kind("--answer", "/told", "{max_num_batched_tokens}")}
        async with local_fleet(tmp_path, kinds, sleepers=ROOM) as (fleet, heard):
            first = await ready(fleet, heard, 1)
            await asleep(fleet, heard, 1)
            other = an_instance(2)
            other.max_num_batched_tokens = 512
            heard.clock.post(lambda: fleet.create(other))
            await until(lambda: 2 in heard.ready, "ready")
            assert other.source == ""
            await until(lambda: not alive(first), "nobody would wake it")
            assert heard.sleepers == {}

    asyncio.run(story())


@pytest.mark.slow
def test_beside_kinds_that_sleep_others_are_stopped_as_ever(tmp_path: Path) -> None:
    async def story() -> None:
        clock = LiveClock(asyncio.get_running_loop())
        heard = Heard(clock)
        environment = FleetEnvironment(clock=clock, events=heard, log_directory=tmp_path, sleepers=ROOM)
        fleet = UnionFleet({"sleepy": sleeping_kind(), "plain": stub_kind()}, environment)
        assert fleet.sleeping_kinds == {"sleepy"}
        for number, kind in ((1, "sleepy"), (2, "plain")):
            instance = an_instance(number, kind)
            clock.post(lambda instance=instance: fleet.create(instance))  # type: ignore[misc]
        await until(lambda: sorted(heard.ready) == [1, 2], "both are ready")
        for number, kind in ((1, "sleepy"), (2, "plain")):
            await asleep(fleet, heard, number, kind)
        await until(lambda: len(children()) == 1, "only one lives")
        assert heard.sleepers == {"sleepy": 1}
        clock.post(lambda: fleet.keep_asleep("plain", 0))
        clock.post(lambda: fleet.keep_asleep("sleepy", 0))
        await until(lambda: not children() and heard.sleepers == {}, "that is gone, too")
        await fleet.close()
        clock.stop()

    asyncio.run(story())
