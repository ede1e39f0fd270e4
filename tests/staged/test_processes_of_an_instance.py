"""Replicas that cannot be started: not for ever, with the reason, and none is left."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from staged_models import need_torch, tiny

need_torch()

from chiron.engines.staged import instance  # noqa: E402
from chiron.engines.staged.errors import StagedModelError  # noqa: E402
from chiron.engines.staged.instance import StageProcesses, StageSpec, read_specs  # noqa: E402
from staged_site import staged_site  # noqa: E402

WHOLE = {"layers": "0-3"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"pace_ms": 60_001}, "pace_ms: 60001 must be a number from 0 to 60000"),
        ({"kv_capacity_tokens": 63}, "kv_capacity_tokens: 63 must be 64 or more, or 0"),
        ({"device": "GPU 1"}, "device: 'GPU 1' must be cpu, cuda, cuda:0"),
        ({"max": 257}, "must be 1 <= min <= max <= 256"),
        ({"most": 2}, "most: unknown key"),
        ({"device": "cuda", "max": 2}, "device 'cuda' and max 2: replicas would share the GPU; max must be 1"),
    ],
)
def test_what_no_stage_would_take_is_refused_before_one_is_started(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(StagedModelError) as caught:
        read_specs(json.dumps([{**WHOLE, **spec}]), 4)
    assert said in str(caught.value)


def test_no_stage_is_scaled_beyond_its_bounds() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3"), replicas=(0, 0)) as site:
            given = [{"layers": "0-1", "min": 2, "max": 3, "kv_capacity_tokens": 640}, {"layers": "2-3"}]
            processes = StageProcesses(site.engine, read_specs(json.dumps(given), 4), lambda spec: ["false"])
            processes._closing = True  # None is started.
            processes.scale((5000, 5000))
            assert processes.wanted == [3, 1]
            processes.scale((0, -1))
            assert processes.wanted == [2, 1]

    asyncio.run(main())


@pytest.mark.parametrize(("code", "timeout_s"), [("raise SystemExit(1)", 600.0), ("input()", 0.2)])
def test_a_stage_that_never_starts_ends_the_instance(
    monkeypatch: pytest.MonkeyPatch, code: str, timeout_s: float
) -> None:
    monkeypatch.setattr(instance, "_RETRY_S", 0.01)
    monkeypatch.setattr(instance, "_LOOK_S", 0.02)
    started = 0

    def command(spec: StageSpec) -> list[str]:
        nonlocal started
        started += 1
        return [sys.executable, "-S", "-c", code]

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), replicas=(0,)) as site:
            processes = StageProcesses(site.engine, specs(), command, start_timeout_s=timeout_s)
            processes.start()
            async with asyncio.timeout(60.0):
                with pytest.raises(StagedModelError, match="layers 0-3: 5 replicas in succession ended at once"):
                    await processes.until_ready()
            await processes.close()

    asyncio.run(main())
    assert started == 5


def test_none_is_started_while_all_are_stopped() -> None:
    started = 0

    def command(spec: StageSpec) -> list[str]:
        nonlocal started
        started += 1
        return [sys.executable, "-S", "-c", "print('ready port=9', flush=True); input()"]

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), replicas=(0,)) as site:
            processes = StageProcesses(site.engine, specs(), command)
            processes.start()
            async with asyncio.timeout(60.0):
                while not processes.counts(0)[0]:
                    await asyncio.sleep(0.01)
                await processes.close()

    asyncio.run(main())
    assert started == 1


def test_a_start_counts_as_long_as_the_last_one_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reads weights from a cold disk, and lives for ever."""
    monkeypatch.setattr(instance, "_DOWN_S", 60.0)
    pauses_s = iter((0.5, 0.0))

    def command(spec: StageSpec) -> list[str]:
        code = f"import time; time.sleep({next(pauses_s)}); print('ready port=9', flush=True); input()"
        return [sys.executable, "-S", "-c", code]

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), replicas=(0,)) as site, asyncio.timeout(60.0):
            processes = StageProcesses(site.engine, read_specs(json.dumps([{**WHOLE, "max": 2}]), 4), command)
            processes.start()
            for count in (1, 2):
                processes.scale([count])
                while processes.counts(0)[0] < count:
                    await asyncio.sleep(0.01)
            slow, quick = processes._replicas[0]
            assert slow.start_s >= 0.5
            assert processes.start_s == [quick.start_s]
            await processes.close()

    asyncio.run(main())


def specs() -> Sequence[StageSpec]:
    return read_specs(json.dumps([WHOLE]), 4)


def test_a_stage_that_still_loads_ends_with_whoever_started_it() -> None:
    """And not at a signal, which a supervisor sends to every process."""
    ends_with_its_starter("""if True:
        import os, signal, time
        from chiron.engines.staged.stage import Starter
        starter = Starter()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        print("on")
        time.sleep(600)
    """)


def test_a_stage_whose_step_never_returns_ends_with_whoever_started_it() -> None:
    ends_with_its_starter("""if True:
        import asyncio, time
        from concurrent.futures import ThreadPoolExecutor
        from chiron.engines.staged import stage

        async def main():
            stage._END_S, stop = 0.1, asyncio.Event()
            stage.Starter(0.1).serving(stop.set)
            ThreadPoolExecutor(1).submit(time.sleep, 600)
            print("on")
            await stop.wait()

        asyncio.run(main())
    """)


def ends_with_its_starter(code: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "on\n"
        process.stdin.close()
        assert process.wait(60.0) == 1
        process.stdout.close()
    finally:
        process.kill()
        process.wait()
