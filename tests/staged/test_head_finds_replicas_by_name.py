"""A head whose replicas are all addresses of a name, as a headless Service has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest

from chiron.engines.staged.discovery import ADDRESSES_MAX, Discovery
from chiron.engines.staged.errors import StagedModelError
from staged_models import need_torch, tiny

Answer = list[str] | Exception


class Names:
    """A name server that gives each name one answer after the other, and the last one again and again."""

    def __init__(self, **answers: list[Answer]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self._answers[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def told_by(names: list[list[str]], server: Names, times: int) -> list[list[list[str]]]:
    """What a head hears, until each name was resolved so often."""
    told: list[list[list[str]]] = []
    discovery = Discovery(
        names, lambda found: told.append([list(each) for each in found]), every_s=0.001, resolve=server.resolve
    )
    discovery.start()
    async with asyncio.timeout(60.0):
        while any(server.asked.count(name.split(":")[0]) < times for stage in names for name in stage):
            await asyncio.sleep(0.001)
    await discovery.close()
    return told


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([["10.0.0.2", "10.0.0.1", "10.0.0.2"]], [["a@10.0.0.1:9", "a@10.0.0.2:9"]]),
        ([["10.0.0.1"], ["10.0.0.1"], ["10.0.0.2"]], [["a@10.0.0.1:9"], ["a@10.0.0.2:9"]]),
        ([["10.0.0.1"], OSError("no answer"), ["10.0.0.1"]], [["a@10.0.0.1:9"]]),
        ([OSError("no such name"), ["fd00::1"]], [["a@[fd00::1]:9"]]),
        ([["10.0.0.1"], []], [["a@10.0.0.1:9"], []]),
        ([UnicodeError("label too long"), ["10.0.0.1"]], [["a@10.0.0.1:9"]]),
        ([["10.0.0.1"], RuntimeError("as a test"), ["10.0.0.2"]], [["a@10.0.0.1:9"], ["a@10.0.0.2:9"]]),
    ],
    ids=["each once", "changed", "away", "later, IPv6", "none", "no host name", "a fault"],
)
def test_a_stage_has_what_the_last_answer_says(answers: list[Answer], told: list[list[str]]) -> None:
    heard = asyncio.run(told_by([["a:9"]], Names(a=answers), 5))
    assert [stages[0] for stages in heard] == told


def test_a_name_that_does_not_resolve_holds_up_no_other_stage(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Names):
        async def resolve(self, host: str, port: int) -> Sequence[str]:
            if host == "a":
                self.asked += ["a"] * 9
                await asyncio.Event().wait()
            return await super().resolve(host, port)

    failing = OSError("no such name")
    with caplog.at_level(logging.WARNING):
        heard = asyncio.run(told_by([["a:9"], ["b:9"], ["c:9"]], Stuck(a=[[]], b=[["10.0.0.1"]], c=[failing]), 3))
    assert heard == [[[], ["b@10.0.0.1:9"], []]]
    assert caplog.text.count("no such name; its replicas stay as they are") == 1


def test_what_a_head_could_not_take_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    told = 0

    def tell(found: Sequence[Sequence[str]]) -> None:
        nonlocal told
        told += 1
        if told < 3:
            raise StagedModelError("as a test")

    async def main() -> None:
        discovery = Discovery([["a:9"]], tell, every_s=0.001, resolve=Names(a=[["10.0.0.1"]]).resolve)
        discovery.start()
        async with asyncio.timeout(60.0):
            while told < 3:
                await asyncio.sleep(0.001)
        await discovery.close()

    asyncio.run(main())
    assert caplog.text.count("as a test") == 1


def test_a_name_with_very_many_addresses_gives_some() -> None:
    many = [f"10.0.{number // 250}.{number % 250}" for number in range(ADDRESSES_MAX + 10)]
    (heard,) = asyncio.run(told_by([["a:9"]], Names(a=[many]), 3))
    assert len(heard[0]) == ADDRESSES_MAX


@pytest.mark.parametrize("name", ["stage", "stage:", ":9000", "stage:0", "stage:²", "stage:70000"])
def test_a_name_without_host_or_port_is_refused(name: str) -> None:
    with pytest.raises(StagedModelError, match="must be HOST:PORT"):
        Discovery([[name]], lambda found: None, every_s=1.0)


def test_sequences_go_through_what_the_machine_resolves() -> None:
    need_torch()
    from staged_site import staged_site, until

    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3"), replicas=(0, 0)) as site:
            ports = [(await site.add(stage)).address.rpartition(":")[2] for stage in (0, 1)]
            pipeline = site.engine.pipeline
            discovery = Discovery([[f"localhost:{port}"] for port in ports], pipeline.set_replicas, every_s=0.05)
            discovery.start()
            await until(lambda: all(any(each.up for each in stage) for stage in pipeline.replicas))
            assert len(await site.complete([1, 2, 3], 4)) == 4
            assert {each.address for each in pipeline.replicas[0]} >= {f"localhost@127.0.0.1:{ports[0]}"}
            await discovery.close()

    asyncio.run(main())
