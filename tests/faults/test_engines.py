"""Engines that die, hang, refuse and come back, and a gateway that is told to stop: what clients and batches see."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fault_site import ENGINE, Answer, Api, FaultSite, chat, config, item, started_engines, wait_for
from ports import free_port

QUICK = '[limits]\nengine_stall = "3s"'


async def ended(api: Api, batch_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """The batch once it has ended."""
    until_s = time.monotonic() + timeout_s
    while True:
        batch = await api.batch(batch_id)
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            return batch
        assert time.monotonic() < until_s, batch
        await asyncio.sleep(0.05)


async def talk(api: Api, *bodies: dict[str, Any]) -> list[Answer]:
    """All at once, to their ends."""
    answers = [Answer(api.origin, body) for body in bodies]
    for answer in answers:
        await answer.end()
    return answers


@contextmanager
def engine(directory: Path, port: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """An engine that the gateway did not start."""
    command = [sys.executable, str(ENGINE), "--directory", str(directory), "--port", str(port), "--speedup", "4"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline().startswith("chiron-engine ready")
        yield process
    finally:
        process.kill()
        process.wait()


def endpoints(*ports: int) -> str:
    return f'engine = "emulated"\nmax_num_seqs = 16\nendpoints = {[f"http://127.0.0.1:{port}" for port in ports]}'


# -- poison ----------------------------------------------------------------------------------------------------


async def poison(site: FaultSite, marks: list[str], good: int) -> dict[str, str]:
    """Reasons in the error file, by mark; everything else must finish."""
    async with Api(site.url) as api:
        lines = [item(f"good-{i}") for i in range(good)]
        for place, mark in enumerate(marks):
            lines.insert(7 * place + 3, item(mark, text=mark))
        # Poison that is all there is left fails without a success in between, so it is tried ever less often.
        batch = await ended(api, await api.submit(lines), 150.0)
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": len(lines), "completed": good, "failed": len(marks)}
        assert [line["custom_id"] for line in await api.lines(batch, "output_file_id")] == [
            f"good-{i}" for i in range(good)
        ]
        failed = await api.lines(batch, "error_file_id")
        assert {line["custom_id"] for line in failed} == set(marks)
        assert {line["error"]["code"] for line in failed} == {"request_failed"}
        return {line["custom_id"]: line["error"]["message"] for line in failed}


def check_tries(site: FaultSite, marks: list[str], lines_start: int = 3) -> None:
    starts = site.diary().counts["start"]
    for place in range(len(marks)):
        tries = [count for id, count in starts.items() if id.endswith(f"{7 * place + lines_start:08x}")]
        assert tries, marks[place]
        assert max(tries) <= 12, "four tries, two more alone, and each again where a kept connection was gone"


@pytest.mark.slow
def test_poison_fails_alone_and_says_why(tmp_path: Path) -> None:
    marks = ["<500>", "<hang-up>"]
    with FaultSite(tmp_path, config(started_engines(tmp_path))) as site:
        reasons = asyncio.run(poison(site, marks, 40))
        assert "the engine answered 500" in reasons["<500>"]
        assert "the connection was lost before its answer" in reasons["<hang-up>"]
        assert all("Failed after 2 attempts" in reason for reason in reasons.values())
        check_tries(site, marks)


@pytest.mark.slow
def test_poison_that_kills_or_stalls_its_engine_fails_alone_too(tmp_path: Path) -> None:
    marks = ["<die>", "<hang>", "<500>"]
    model = started_engines(tmp_path, min_instances=2, max_instances=2)
    with FaultSite(tmp_path, config(model, extra=QUICK)) as site:
        reasons = asyncio.run(poison(site, marks, 60))
        assert "the engine sent nothing for 3 s" in reasons["<hang>"]
        assert "Failed after 2 attempts" in reasons["<die>"]
        check_tries(site, marks)


# -- engines that refuse, stall, go and come back --------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_that_always_refuses_beside_a_good_one_is_not_noticed(tmp_path: Path) -> None:
    async def run(site: FaultSite) -> None:
        async with Api(site.url) as api:
            batch_id = await api.submit([item(f"c{i}") for i in range(60)])
            for number in range(3):
                answers = await talk(api, *(chat(f"{number} {i}", stream=bool(i % 2)) for i in range(8)))
                assert {answer.verdict for answer in answers} == {"complete"}
            batch = await ended(api, batch_id)
            assert batch["request_counts"] == {"total": 60, "completed": 60, "failed": 0}

    ports = free_port(), free_port()
    with ExitStack() as stack:
        stack.enter_context(engine(tmp_path, ports[0], "--sick"))
        stack.enter_context(engine(tmp_path, ports[1]))
        site = stack.enter_context(FaultSite(tmp_path, config(endpoints(*ports))))
        asyncio.run(run(site))
        assert sum(site.diary().counts["refuse"].values()) > 0, "the sick one was asked"


@pytest.mark.slow
def test_a_request_that_its_engine_forgets_is_tried_elsewhere_and_then_told_so(tmp_path: Path) -> None:
    async def run(site: FaultSite) -> None:
        async with Api(site.url) as api:
            # What comes in one piece is never held for stalled, however slow its engine.
            (forgotten, fine) = await talk(api, chat("<hang>"), chat("fine", tokens=100, stream=False))
            assert fine.verdict == "complete"
            assert (forgotten.verdict, forgotten.status) == ("refused", 504)
            assert b"did not answer in time" in forgotten.text

    extra = '[limits]\nengine_stall = "200ms"'
    with FaultSite(tmp_path, config(started_engines(tmp_path), extra=extra)) as site:
        asyncio.run(run(site))
        # The gateway gave it up, and told so, whether or not the engine had got to it by then.
        wait_for(lambda: max(site.diary().counts["start"].values()) >= 4, "the last try reaches the engine")
    assert max(site.diary().counts["start"].values()) == 4, "once, and three tries more"


@pytest.mark.slow
def test_endpoints_that_go_and_come_back(tmp_path: Path) -> None:
    ports = free_port(), free_port()

    async def run(site: FaultSite, stack: ExitStack, first: subprocess.Popen[str]) -> None:
        async with Api(site.url) as api:
            batch_id = await api.submit([item(f"c{i}", 100) for i in range(300)])
            begun = [Answer(api.origin, chat(f"long {i}", 400)) for i in range(8)]
            for answer in begun:
                await answer.first.wait()
            first.kill()
            # What had begun there ends with a clear error; everything else goes to the other one.
            assert {await answer.end() for answer in begun} <= {"complete", "error event"}
            answers = await talk(api, *(chat(f"one {i}") for i in range(10)))
            assert {answer.verdict for answer in answers} == {"complete"}
            second.kill()
            held = [Answer(api.origin, chat(f"none {i}")) for i in range(5)]
            await asyncio.to_thread(wait_for, lambda: "stopped answering" in site.log.read_text(), "it is noticed")
            assert [answer.verdict for answer in held] == [""] * 5
            await asyncio.to_thread(stack.enter_context, engine(tmp_path, ports[0]))
            assert {await answer.end() for answer in held} == {"complete"}
            batch = await ended(api, batch_id)
            assert batch["request_counts"] == {"total": 300, "completed": 300, "failed": 0}

    with ExitStack() as stack:
        first = stack.enter_context(engine(tmp_path, ports[0]))
        second = stack.enter_context(engine(tmp_path, ports[1]))
        text = config(endpoints(*ports), extra='[limits]\noutage_wait = "5m"')
        site = stack.enter_context(FaultSite(tmp_path, text))
        asyncio.run(run(site, stack, first))


@pytest.mark.slow
def test_from_zero_to_zero_and_from_zero_again_every_request_is_held_and_answered(tmp_path: Path) -> None:
    async def run(site: FaultSite) -> None:
        async with Api(site.url) as api:
            for number in range(2):
                # The load is a mean over a minute, so it takes one to forget it.
                await asyncio.to_thread(wait_for, lambda: not site.engines(), "the last engine is stopped", 120.0)
                answers = await talk(api, *(chat(f"{number} {i}", stream=bool(i % 2)) for i in range(30)))
                assert {answer.verdict for answer in answers} == {"complete"}

    extra = """
[policies.chiron]
tick = "1s"
keep_last = "2s"
hold = "1s"
adapt_headroom = false
memory = 10
prior_load = 0.001
prior = 1
"""
    model = started_engines(tmp_path, min_instances=0, max_instances=2)
    with FaultSite(tmp_path, config(model, extra=extra)) as site:
        asyncio.run(run(site))


# -- the gateway is told to stop -------------------------------------------------------------------------------


SEQS = 16


@pytest.mark.slow
def test_sigterm_lets_what_runs_end_and_a_batch_goes_on_later(tmp_path: Path) -> None:
    async def stop(site: FaultSite) -> str:
        async with Api(site.url) as api:
            batch_id = await api.submit([item(f"c{i}", 60) for i in range(150)])
            kept = Api(site.url)
            running = [Answer(kept.origin, chat(f"long {i}", 200, stream=bool(i % 2))) for i in range(6)]
            for answer in running[1::2]:
                await answer.first.wait()
            assert site.process is not None
            site.process.send_signal(signal.SIGTERM)
            assert {await answer.end() for answer in running} == {"complete"}
            await kept.origin.close()
            assert await asyncio.to_thread(site.process.wait, 60) == 0
            return batch_id

    async def go_on(site: FaultSite, batch_id: str) -> None:
        async with Api(site.url) as api:
            batch = await ended(api, batch_id)
            assert batch["request_counts"] == {"total": 150, "completed": 150, "failed": 0}
            assert len(await api.lines(batch, "output_file_id")) == 150

    text = config(started_engines(tmp_path, seqs=SEQS)).replace('grace = "10s"', 'grace = "60s"')
    with FaultSite(tmp_path, text) as site:
        batch_id = asyncio.run(stop(site))
        assert site.await_nobody() == []
        done = site.finished_on_disk()
        before = site.diary()
        site.start()
        asyncio.run(go_on(site, batch_id))
        after = site.diary()
        assert all(after.began(id) == before.began(id) for id in done), "what was done is not done again"
        finished = {id for id in before.counts["finish"] if id.startswith("batch_")}
        assert done <= finished
        crossed = finished - done
        # An engine had sent their ends, and the gateway that stopped had not read them: no more than ran at once.
        assert len(crossed) <= SEQS * len(before.running), "what engines had finished was kept"
        assert all(after.began(id) == before.began(id) + 1 for id in crossed)
