"""Whatever comes in whatever order, each instance is answered at most once and nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from random import Random

import pytest

from chiron.fleet.settings import SleeperSettings
from fleet_factory import an_instance, kill, local_fleet, quick_settings, sleeping_kind, stub_kind

uvloop = pytest.importorskip("uvloop")


@pytest.mark.slow
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_creating_removing_suspecting_and_killing_at_random(tmp_path: Path, loop) -> None:  # type: ignore[no-untyped-def]
    kinds = {
        "sound": stub_kind(stop_timeout_s=0.5, gpus=1),
        "parent": stub_kind("--grandchild", str(tmp_path / "child"), "--grandchild-session", port=None),
        "short-lived": stub_kind("--life", "0.3"),
        "broken": stub_kind("--exit-code", "1"),
        "stubborn": stub_kind("--ignore-sigterm", stop_timeout_s=0.2),
        "sleepy": sleeping_kind(stop_timeout_s=0.5, gpus=1),
        "sleepless": sleeping_kind("--unknown", "/sleep?level=1", stop_timeout_s=0.5, gpus=1),
    }

    async def story() -> None:
        draws = Random("fleet chaos")
        live = {}
        created = slept = 0
        settings, room = quick_settings(start_wait_s=1.0), SleeperSettings(host_memory_gb=20.0)
        async with local_fleet(tmp_path / "logs", kinds, settings, ("0", "1", "2"), room) as (fleet, heard):
            end_s = time.monotonic() + 12.0

            def enough() -> bool:
                """Some have come, some have failed, and some have slept or could not."""
                sleepy = fleet.report().kinds["sleepy"].sleep
                assert sleepy is not None
                tried = sleepy.asleep + sleepy.wakes + sleepy.failed_sleeps + sleepy.failed_wakes + sleepy.lost
                return bool(created > 30 and heard.ready and heard.failed and heard.asleep and tried)

            # For longer where the machine stalls.
            while (now_s := time.monotonic()) < end_s or not enough():
                assert now_s < end_s + 60.0, (created, heard.ready, heard.failed)
                live = {number: instance for number, instance in live.items() if instance.state != "gone"}
                draw = draws.random()
                if draw < 0.5 and len(live) < 10:
                    created += 1
                    live[created] = an_instance(created, draws.choice(list(kinds)))
                    fleet.create(live[created])
                elif draw < 0.6 and live:
                    fleet.remove(live.pop(draws.choice(list(live))))
                elif draw < 0.75 and (up := [n for n, each in live.items() if each.state == "ready"]):
                    slept += 1
                    fleet.sleep(live.pop(draws.choice(up)))
                elif draw < 0.85 and fleet._engines:
                    process = draws.choice([*fleet._engines.values(), *fleet._sleepers._asleep]).process
                    kill(draws.choice([process.supervisor_pid, process.pid or process.supervisor_pid]))
                elif live:
                    fleet.suspect(draws.choice(list(live.values())))
                await asyncio.sleep(0.06 * draws.random())
        assert created > 30
        assert len(heard.ready) == len(set(heard.ready)) > 0
        assert len(heard.failed) == len(set(heard.failed)) > 0
        assert 0 < len(heard.asleep) == len(set(heard.asleep)) <= slept
        assert not set(heard.asleep) & set(heard.failed)
        assert fleet.devices.free == 3
        assert not fleet._ports
        assert not fleet._engines
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())
