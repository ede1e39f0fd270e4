"""GPUs are handed out, kept apart and taken back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.fleet.process.devices import Devices
from fleet_factory import an_instance, local_fleet, quick_settings, starts_of, stub_kind, until


def test_each_instance_sees_devices_of_its_own_and_gives_them_back(tmp_path: Path) -> None:
    async def story() -> None:
        kinds = {f"stub{n}": stub_kind("--environment", str(tmp_path / f"seen{n}"), gpus=2) for n in (1, 2, 3)}
        async with local_fleet(tmp_path / "logs", kinds, devices=("0", "1", "GPU-x", "3")) as (fleet, heard):
            instances = {n: an_instance(n, f"stub{n}") for n in (1, 2, 3)}
            for n in (1, 2, 3):
                fleet.create(instances[n])
            await until(lambda: len(heard.ready) == 2, "two are ready")
            assert (tmp_path / "seen1").read_text().startswith("CUDA_VISIBLE_DEVICES=0,1,HIP_VISIBLE_DEVICES=0,1,")
            assert (tmp_path / "seen2").read_text().startswith("CUDA_VISIBLE_DEVICES=GPU-x,3,")
            assert not (tmp_path / "seen3").exists()
            fleet.remove(instances[2])
            await until(lambda: 3 in heard.ready, "the third is ready")
            assert (tmp_path / "seen3").read_text().startswith("CUDA_VISIBLE_DEVICES=GPU-x,3,")
        assert fleet.devices.free == 4

    asyncio.run(story())


def test_an_instance_that_gets_no_device_in_time_fails_without_slowing_its_kind(tmp_path: Path) -> None:
    async def story() -> None:
        settings = quick_settings(start_wait_s=0.2)
        async with local_fleet(tmp_path, {"stub": stub_kind(gpus=1)}, settings, devices=("0",)) as (fleet, heard):
            fleet.create(an_instance(1))
            await until(lambda: heard.ready == [1], "ready")
            fleet.create(an_instance(2))
            await until(lambda: heard.failed == [2], "failed")
            assert "1 of 1 devices did not become free within 0.2 s" in heard.reasons[2]
            assert starts_of(fleet).state == "ok"

    asyncio.run(story())


def test_devices_are_given_first_come_first_served_and_survive_cancellation() -> None:
    async def story() -> None:
        devices = Devices(["a", "b"])
        assert await devices.take(1, 1.0) == ("a",)
        big = asyncio.create_task(devices.take(2, 60.0))
        await asyncio.sleep(0)
        small = asyncio.create_task(devices.take(1, 60.0))
        await asyncio.sleep(0.01)
        assert not small.done(), "one that asked later does not overtake"
        big.cancel()
        assert await small == ("b",)
        late = asyncio.create_task(devices.take(1, 60.0))
        await asyncio.sleep(0.01)
        devices.give(("a",))  # Handed to the waiting one ...
        late.cancel()  # ... which leaves in the same moment.
        await asyncio.gather(late, return_exceptions=True)
        assert devices.free == 1
        assert await devices.take(2, 0.01) is None
        assert await devices.take(1, 0.01) == ("a",)

    asyncio.run(story())


def test_a_device_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="each may be named once"):
        Devices(["0", "0"])


def test_waiting_for_a_device_is_no_part_of_the_start(tmp_path: Path) -> None:
    async def story() -> None:
        async with local_fleet(tmp_path, {"stub": stub_kind(gpus=1)}, devices=("0",)) as (fleet, heard):
            first, second = an_instance(1), an_instance(2)
            fleet.create(first)
            fleet.create(second)
            await until(lambda: heard.ready == [1], "the first is ready")
            assert first.began_s >= 0.0
            freed_s = heard.clock.elapsed_s()
            fleet.remove(first)
            await until(lambda: heard.ready == [1, 2], "the second is ready")
            assert second.began_s >= freed_s - 0.01

    asyncio.run(story())
