"""Instances as processes: start, ready, failure, removal."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from child_processes import children
from chiron.fleet.health import HealthTarget, Probe
from chiron.fleet.port import FleetEnvironment
from chiron.fleet.process.fleet import ProcessFleet, ProcessSource
from chiron.net.client import Origin
from chiron.net.clock import LiveClock
from chiron.net.server import serve
from fleet_factory import (
    QUICK_HEALTH,
    Heard,
    alive,
    an_instance,
    kill,
    local_fleet,
    pid_in,
    quick_settings,
    stub_kind,
    until,
)


@pytest.mark.parametrize("port", ["{port}", None], ids=["given port", "ready line"])
def test_an_instance_becomes_ready_answers_and_is_gone_when_removed(tmp_path: Path, port: str | None) -> None:
    async def story() -> None:
        async with local_fleet(tmp_path, {"stub": stub_kind(port=port)}) as (fleet, heard):
            instance = an_instance(1)
            fleet.create(instance)
            assert not heard.ready, "a port's calls do not answer at once"
            await until(lambda: heard.ready == [1], "ready")
            origin = Origin(heard.urls[1])
            assert (await origin.fetch("GET", "/v1/models")).status == 200
            await origin.close()
            # The first sample may be of the moment before the engine's process began.
            await until(lambda: 1 in fleet.report().usage and fleet.report().usage[1].rss_bytes > 1_000_000, "usage")
            usage = fleet.report().usage[1]
            assert usage.cpu_share >= 0.0
            fleet.remove(instance)
            fleet.remove(instance)
            await until(lambda: not alive(usage.pid), "the process is gone")
            assert not heard.failed
            assert not fleet.report().usage

    asyncio.run(story())


def test_a_command_gets_the_token_budget_of_its_instance(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {"stub": stub_kind("--answer", "/told", "{max_num_batched_tokens}")}
        async with local_fleet(tmp_path, kinds) as (fleet, heard):
            instance = an_instance(1)
            instance.max_num_batched_tokens = 512
            fleet.create(instance)
            await until(lambda: heard.ready == [1], "ready")
            origin = Origin(heard.urls[1])
            assert (await origin.fetch("GET", "/told")).body == b"512"
            await origin.close()

    asyncio.run(story())


def test_a_crash_is_noticed_at_once_and_says_why(tmp_path: Path) -> None:
    async def story() -> None:
        # No health check comes before the test gives up: it is the exit that is noticed.
        settings = replace(quick_settings(), health=replace(QUICK_HEALTH, health_period_s=600.0))
        async with local_fleet(tmp_path, {"stub": stub_kind()}, settings) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready and fleet.report().usage, "ready")
            kill(fleet.report().usage[1].pid, signal.SIGSEGV)
            await until(lambda: heard.failed == [1], "failed")
            assert "killed by SIGSEGV" in heard.reasons[1]
            assert "stub: begins" in heard.reasons[1], "the reason quotes the log"

    asyncio.run(story())


def test_a_start_that_exits_fails_with_the_last_lines_of_its_log(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {"stub": stub_kind("--exit-code", "7"), "none": ProcessSource(command=("/no/such/engine", "{port}"))}
        async with local_fleet(tmp_path, kinds) as (fleet, heard):
            fleet.create(an_instance(1))
            fleet.create(an_instance(2, "none"))
            await until(lambda: sorted(heard.failed) == [1, 2], "both failed")
            assert "exited with status 7" in heard.reasons[1]
            assert "cannot load the model: out of luck" in heard.reasons[1]
            assert "cannot run '/no/such/engine': No such file or directory" in heard.reasons[2]
            assert not heard.ready

    asyncio.run(story())


@pytest.mark.parametrize("port", ["{port}", None], ids=["given port", "ready line"])
def test_a_start_that_takes_too_long_fails(tmp_path: Path, port: str | None) -> None:
    async def story() -> None:
        kind = stub_kind("--start-delay", "60", port=port, start_timeout_s=1.0)
        async with local_fleet(tmp_path, {"stub": kind}) as (fleet, heard):
            why = "no ready line" if port is None else "cannot connect"
            for number in range(1, 6):  # Again if the machine stalled for all of the second, and it was not looked at.
                fleet.create(an_instance(number))
                await until(lambda number=number: number in heard.failed, "failed")  # type: ignore[misc]
                assert "not ready within 1 s" in heard.reasons[number]
                if why in heard.reasons[number]:
                    break
            assert why in heard.reasons[number]
            await until(lambda: not children(), "the process is gone")

    asyncio.run(story())


def test_an_instance_may_be_removed_while_it_starts(tmp_path: Path) -> None:
    async def story() -> None:
        async with local_fleet(tmp_path, {"stub": stub_kind("--start-delay", "60")}) as (fleet, heard):
            instances = [an_instance(number) for number in range(1, 5)]
            for instance in instances:
                fleet.create(instance)
            fleet.remove(instances[0])  # Before its task ran at all.
            for instance in instances[1:]:
                await asyncio.sleep(0.01 * instance.id)  # At several points of its start.
                fleet.remove(instance)
            await until(lambda: not children(), "all processes are gone")
            assert not heard.ready
            assert not heard.failed

    asyncio.run(story())


def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def story() -> None:
        grandchild = tmp_path / "grandchild"
        kind = stub_kind("--ignore-sigterm", "--grandchild", str(grandchild), stop_timeout_s=0.3)
        async with local_fleet(tmp_path / "logs", {"stub": kind}) as (fleet, heard):
            instance = an_instance(1)
            fleet.create(instance)
            await until(lambda: heard.ready and fleet.report().usage, "ready")
            pid = fleet.report().usage[1].pid
            removed_s = time.monotonic()
            fleet.remove(instance)
            await until(lambda: not alive(pid), "killed")
            assert time.monotonic() - removed_s > 0.25
            await until(lambda: not alive(pid_in(grandchild)), "killed with what it started")

    asyncio.run(story())


def test_three_bad_checks_in_a_row_count_and_two_do_not() -> None:
    async def story() -> None:
        answers = [503, 503, 200, 503, 503, 200, 503, 503, 503, 200]
        server = await serve(lambda incoming: incoming.respond(answers.pop(0), b"{}"))
        probe = Probe(HealthTarget(url=f"http://127.0.0.1:{server.port}"), replace(QUICK_HEALTH, health_period_s=0.01))
        async with asyncio.timeout(60.0):
            await probe.until_failed(asyncio.Event())
        assert answers == [200], "it is not asked again"
        assert "answers with status 503" in probe.reason
        await probe.close()
        await server.close()

    asyncio.run(story())


def test_an_engine_that_stops_answering_fails(tmp_path: Path) -> None:
    async def story() -> None:
        deaf = tmp_path / "deaf"
        settings = replace(quick_settings(), health=replace(QUICK_HEALTH, health_timeout_s=0.3))
        async with local_fleet(tmp_path / "logs", {"stub": stub_kind("--deaf", str(deaf))}, settings) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready == [1], "ready")
            deaf.touch()
            await until(lambda: heard.failed == [1], "failed")
            assert "no answer within 0.3 s" in heard.reasons[1]

    asyncio.run(story())


def test_a_suspected_instance_is_checked_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        sick = tmp_path / "sick"
        settings = replace(quick_settings(), health=replace(QUICK_HEALTH, health_period_s=600.0))
        async with local_fleet(tmp_path / "logs", {"stub": stub_kind("--sick", str(sick))}, settings) as (fleet, heard):
            instance = an_instance(1)
            fleet.create(instance)
            await until(lambda: heard.ready == [1], "ready")
            fleet.suspect(instance)
            await asyncio.sleep(0.1)
            assert not heard.failed, "a suspicion alone is no failure"
            sick.touch()
            fleet.suspect(instance)
            await until(lambda: heard.failed == [1], "failed")
            assert "answers with status 503" in heard.reasons[1]
            fleet.suspect(instance)  # Gone by now: harmless.

    asyncio.run(story())


def test_the_environment_reaches_the_engine_but_not_the_settings_repr(tmp_path: Path) -> None:
    async def story() -> None:
        seen = tmp_path / "environment"
        kind = stub_kind("--environment", str(seen), env={"STUB": "a secret"})
        assert "a secret" not in repr(kind)
        async with local_fleet(tmp_path / "logs", {"stub": kind}) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready, "ready")
            assert "STUB=a secret" in seen.read_text()

    asyncio.run(story())


def test_instances_that_start_together_get_ports_of_their_own(tmp_path: Path) -> None:
    async def story() -> None:
        async with local_fleet(tmp_path, {"stub": stub_kind()}) as (fleet, heard):
            for number in range(1, 9):
                fleet.create(an_instance(number))
            await until(lambda: len(heard.ready) == 8, "all ready")
            assert len(set(heard.urls.values())) == 8

    asyncio.run(story())


def test_instances_are_stopped_side_by_side(tmp_path: Path) -> None:
    async def story() -> None:
        kind = stub_kind("--tell-sigterm", stop_timeout_s=600.0)
        async with local_fleet(tmp_path, {"stub": kind}) as (fleet, heard):
            instances = [an_instance(number) for number in range(1, 5)]
            for instance in instances:
                fleet.create(instance)
            await until(lambda: len(heard.ready) == 4, "all ready")
            engines = [engine.process.pid for engine in fleet._engines.values()]
            logs = [fleet.log_path(instance) for instance in instances]
            closing = asyncio.create_task(fleet.close())
            try:
                await until(lambda: all("heard SIGTERM" in log.read_text() for log in logs), "all are told")
                assert all(alive(pid) for pid in engines), "none had to end before the next was told"
            finally:
                for pid in engines:
                    kill(pid)
                await closing

    asyncio.run(story())


def test_a_port_that_somebody_else_took_fails_the_start_and_the_next_one_gets_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with local_fleet(tmp_path, {"stub": stub_kind(port="1")}) as (fleet, heard):
            taken = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
            fleet._sources["stub"] = stub_kind(port=str(taken.sockets[0].getsockname()[1]))
            fleet.create(an_instance(1))
            await until(lambda: heard.failed == [1], "failed")
            assert "Address already in use" in heard.reasons[1]
            fleet._sources["stub"] = stub_kind()
            fleet.create(an_instance(2))
            await until(lambda: heard.ready == [2], "ready")
            taken.close()
            await taken.wait_closed()

    asyncio.run(story())


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="command is empty"):
        ProcessSource(command=())
    with pytest.raises(ValueError, match="start_timeout_s is 0"):
        ProcessSource(command=("engine",), start_timeout_s=0.0)

    async def story() -> None:
        clock = LiveClock(asyncio.get_running_loop())
        with pytest.raises(ValueError, match="gpus is 3; there are 2 devices"):
            ProcessFleet(
                {"big": stub_kind(gpus=3)},
                FleetEnvironment(clock=clock, events=Heard(clock), log_directory=tmp_path, devices=("0", "1")),
            )

    asyncio.run(story())
