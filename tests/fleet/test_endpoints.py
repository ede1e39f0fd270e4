"""Instances as endpoints of somebody else: bound when they answer, left alone until they have recovered."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from chiron.fleet.endpoints import EndpointsFleet, EndpointsSource
from chiron.fleet.health import RecoverySettings
from chiron.fleet.port import FleetEnvironment
from chiron.fleet.settings import FleetSettings
from chiron.net.clock import LiveClock
from fleet_factory import QUICK_HEALTH, STUB, Heard, an_instance, until

QUICK = FleetSettings(
    health=QUICK_HEALTH,
    recovery=RecoverySettings(recover_checks=2, recover_first_s=0.05, recover_max_s=0.1, bind_timeout_s=60.0),
)


@contextlib.asynccontextmanager
async def endpoints(*switches: tuple[str, ...]) -> AsyncIterator[list[str]]:
    """A stub for each tuple of switches; their URLs."""
    processes = [
        await asyncio.create_subprocess_exec(*STUB, "--announce", *given, stdout=subprocess.PIPE) for given in switches
    ]
    urls = []
    try:
        for process in processes:
            assert process.stdout is not None
            await process.stdout.readline()
            urls.append("http://127.0.0.1:" + (await process.stdout.readline()).decode().strip().partition("=")[2])
        yield urls
    finally:
        for process in processes:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def static_fleet(
    kind: EndpointsSource, settings: FleetSettings = QUICK
) -> AsyncIterator[tuple[EndpointsFleet, Heard]]:
    clock = LiveClock(asyncio.get_running_loop())
    heard = Heard(clock)
    environment = FleetEnvironment(clock=clock, events=heard, log_directory=Path("/nowhere"), settings=settings)
    fleet = EndpointsFleet({"stub": kind}, environment)
    try:
        yield fleet, heard
    finally:
        await fleet.close()
        clock.stop()


def test_instances_bind_endpoints_in_order_and_those_beyond_wait_for_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with endpoints((), ()) as urls, static_fleet(EndpointsSource(urls=tuple(urls))) as (fleet, heard):
            instances = [an_instance(number) for number in (1, 2, 3)]
            for instance in instances:
                fleet.create(instance)
            await until(lambda: sorted(heard.ready) == [1, 2], "two are bound")
            assert heard.urls == {1: urls[0], 2: urls[1]}
            fleet.remove(instances[0])
            fleet.remove(instances[0])
            await until(lambda: 3 in heard.ready, "the third is bound")
            assert heard.urls[3] == urls[0]
            assert not heard.failed

    asyncio.run(story())


def test_an_endpoint_that_fails_comes_back_after_several_good_checks(tmp_path: Path) -> None:
    async def story() -> None:
        sick = tmp_path / "sick"
        async with (
            endpoints(("--sick", str(sick))) as urls,
            static_fleet(EndpointsSource(urls=tuple(urls))) as (fleet, heard),
        ):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready == [1], "bound")
            sick.touch()
            await until(lambda: heard.failed == [1], "failed")
            assert "answers with status 503" in heard.reasons[1]
            fleet.create(an_instance(2))  # The control plane asks for another one: there is none, so it waits.
            await asyncio.sleep(0.3)
            assert heard.ready == [1]
            assert fleet.report().kinds["stub"].endpoints[urls[0]].state == "failed"
            sick.unlink()
            await until(lambda: heard.ready == [1, 2], "recovered")
            assert fleet.report().kinds["stub"].endpoints[urls[0]].state == "bound"

    asyncio.run(story())


def test_a_suspected_endpoint_is_checked_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        sick = tmp_path / "sick"
        settings = replace(QUICK, health=replace(QUICK_HEALTH, health_period_s=600.0))
        async with (
            endpoints(("--sick", str(sick))) as urls,
            static_fleet(EndpointsSource(urls=tuple(urls)), settings) as (fleet, heard),
        ):
            instance = an_instance(1)
            fleet.create(instance)
            await until(lambda: heard.ready == [1], "bound")
            sick.touch()
            for _ in range(20):
                fleet.suspect(instance)
            await until(lambda: heard.failed == [1], "failed")

    asyncio.run(story())


def test_an_endpoint_that_is_down_is_passed_over_and_used_once_it_is_up() -> None:
    async def story() -> None:
        async with endpoints(()) as urls:
            kind = EndpointsSource(urls=("http://127.0.0.1:9", urls[0]))
            async with static_fleet(kind) as (fleet, heard):
                fleet.create(an_instance(1))
                await until(lambda: heard.ready == [1], "bound")
                assert heard.urls[1] == urls[0]
                assert "cannot connect" in fleet.report().kinds["stub"].endpoints["http://127.0.0.1:9"].reason

    asyncio.run(story())


def test_without_any_endpoint_an_instance_fails_with_the_reasons() -> None:
    async def story() -> None:
        settings = replace(QUICK, recovery=replace(QUICK.recovery, bind_timeout_s=0.3))
        async with static_fleet(EndpointsSource(urls=("http://127.0.0.1:9",)), settings) as (fleet, heard):
            for number in range(1, 6):  # Again if the machine stalled for all of the time, and nothing was tried.
                fleet.create(an_instance(number))
                await until(lambda number=number: heard.failed[-1:] == [number], "failed")  # type: ignore[misc]
                if "no endpoint within 0.3 s: http://127.0.0.1:9: cannot connect" in heard.reasons[number]:
                    break
            assert "no endpoint within 0.3 s: http://127.0.0.1:9: cannot connect" in heard.reasons[number]
            instance = an_instance(10)
            fleet.create(instance)
            await asyncio.sleep(0)  # It waits for an endpoint now.
            fleet.remove(instance)
            await asyncio.sleep(0.4)
            assert 10 not in heard.failed, "a removed instance is not heard of again"

    asyncio.run(story())


@pytest.mark.parametrize(("health_path", "unknown"), [("", ""), ("/health", "/health")])
def test_an_endpoint_without_a_health_path_is_asked_for_its_models(health_path: str, unknown: str) -> None:
    async def story() -> None:
        switches = ("--authorization", "bearer secret") + (("--unknown", unknown) if unknown else ())
        async with endpoints(switches) as urls:
            kind = EndpointsSource(
                urls=tuple(urls), health_path=health_path, headers={"authorization": "Bearer secret"}
            )
            assert "secret" not in repr(kind)
            async with static_fleet(kind) as (fleet, heard):
                fleet.create(an_instance(1))
                await until(lambda: heard.ready == [1], "bound")

    asyncio.run(story())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="urls is empty"):
        EndpointsSource(urls=())
    with pytest.raises(ValueError, match="each may be named once"):
        EndpointsSource(urls=("http://127.0.0.1:1", "http://127.0.0.1:1"))
    with pytest.raises(ValueError, match="recover_checks is 0"):
        RecoverySettings(recover_checks=0)

    async def story() -> None:
        clock = LiveClock(asyncio.get_running_loop())
        with pytest.raises(ValueError, match="expected http://HOST"):
            EndpointsFleet(
                {"stub": EndpointsSource(urls=("127.0.0.1:8000",))},
                FleetEnvironment(clock=clock, events=Heard(clock), log_directory=Path("/nowhere")),
            )

    asyncio.run(story())


def test_an_instance_from_before_keeps_its_endpoint_and_is_watched(tmp_path: Path) -> None:
    async def story() -> None:
        sick = tmp_path / "sick"
        async with (
            endpoints((), ("--sick", str(sick)), ()) as urls,
            static_fleet(EndpointsSource(urls=tuple(urls))) as (fleet, heard),
        ):
            claim = fleet.adopt("stub", urls[1])
            assert claim is not None
            assert claim.found
            claim.begin(an_instance(7))
            assert fleet.adopt("stub", urls[1]) is None, "it is in use"
            assert fleet.adopt("stub", "http://127.0.0.1:9") is None
            assert fleet.adopt("another", urls[0]) is None
            for number in (8, 9):
                fleet.create(an_instance(number))
            await until(lambda: sorted(heard.ready) == [8, 9], "the others are bound")
            assert set(heard.urls.values()) == {urls[0], urls[2]}
            sick.touch()
            await until(lambda: heard.failed == [7], "it is watched")
            assert sorted(heard.ready) == [8, 9], "nobody waited for it"

    asyncio.run(story())


def test_an_instance_from_before_may_be_removed_at_once() -> None:
    async def story() -> None:
        async with endpoints(()) as urls, static_fleet(EndpointsSource(urls=tuple(urls))) as (fleet, heard):
            claim = fleet.adopt("stub", urls[0])
            assert claim is not None
            instance = an_instance(7)
            claim.begin(instance)
            fleet.remove(instance)
            fleet.create(an_instance(8))
            await until(lambda: heard.ready == [8], "its endpoint is free")

    asyncio.run(story())
