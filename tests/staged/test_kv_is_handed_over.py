"""A replica that is taken out hands its KV to another one, if that is quicker than to compute it again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged import handover as handing  # noqa: E402
from chiron.engines.staged import service  # noqa: E402
from chiron.engines.staged.handover import Handover, replay_s  # noqa: E402
from chiron.engines.staged.head_engine import HeadSettings  # noqa: E402
from chiron.engines.staged.kv import KvStore  # noqa: E402
from chiron.engines.staged.messages import Draining  # noqa: E402
from chiron.engines.staged.pipeline import HANDOVERS_AT_ONCE, PipelineSettings  # noqa: E402
from chiron.engines.staged.replica import ReplicaFigures  # noqa: E402
from chiron.engines.staged.service import Pace  # noqa: E402
from staged_site import PATIENT, LocalReplica, StagedSite, staged_site, until  # noqa: E402

PROMPTS = prompts(3, seed=0)
TOKENS = 24
SPLIT = ("0-0", "1-2", "3-3")


def hand_over(wanted: bool | None) -> PipelineSettings:
    return PipelineSettings(link=PATIENT, drain_s=0.0, absent_s=600.0, hand_over=wanted)


async def taken_out(site: StagedSite, stage: int) -> tuple[LocalReplica, Any]:
    """The replica of a stage has been taken out in mid-stream, and another one put in its place; all answers come."""
    asking = asyncio.gather(*(site.complete(prompt, TOKENS) for prompt in PROMPTS))
    old = site.replicas[stage].pop()
    await until(lambda: old.service.totals.steps > 4)
    await site.add(stage)
    await until(lambda: old.service.kv.sequences == len(PROMPTS))
    site.tell()
    return old, asking


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_answers_are_the_same_and_nothing_is_computed_again(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    monkeypatch.setattr(handing, "MOVE_BYTES", 7 * 256)  # In several parts.

    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pipeline=hand_over(True), pace=Pace(fixed_s=0.004)) as site:
            old, asking = await taken_out(site, stage)
            assert await asking == recorded("llama")
            pipeline = site.engine.pipeline
            assert pipeline.handed_over_tokens >= sum(map(len, PROMPTS))
            assert pipeline.replayed_tokens == pipeline.losses == 0
            assert not any(r.service.totals.refused for rs in site.replicas for r in rs)
            await until(lambda: old.service.kv.sequences == 0 and len(pipeline.replicas[stage]) == 1)
            await until(lambda: site.replicas[stage][0].service.kv.sequences == 0)

    asyncio.run(main())


async def source_dies(site: StagedSite, old: LocalReplica) -> None:
    await old.die()


async def target_dies(site: StagedSite, old: LocalReplica) -> None:
    new = site.replicas[1].pop()
    await site.add(1)
    site.tell()
    await new.die()


async def head_waits_no_longer(site: StagedSite, old: LocalReplica) -> None:
    for handover in site.engine.pipeline._handovers.values():
        handover.until_s = 0.0


@pytest.mark.parametrize("fault", [source_dies, target_dies, head_waits_no_longer])
def test_where_that_fails_it_is_computed_again(fault: Any) -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pipeline=hand_over(True), pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.gather(*(site.complete(prompt, TOKENS) for prompt in PROMPTS))
            old = site.replicas[1].pop()
            await until(lambda: old.service.totals.steps > 4)
            await site.add(1)
            await until(lambda: old.service.kv.sequences == len(PROMPTS))
            old.hold()
            site.tell()
            await until(lambda: len(site.engine.pipeline._handovers) == len(PROMPTS))
            await fault(site, old)
            assert await asking == recorded("llama")
            assert not site.engine.pipeline._handovers
            assert site.engine.pipeline.replayed_tokens >= sum(map(len, PROMPTS))

    asyncio.run(main())


ENDLESS = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 1900, "ignore_eos": True}


def test_a_full_batch_is_handed_over_without_losing_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 40
    monkeypatch.setattr(service, "_CALLS_MAX", count // 2)  # It lets fewer calls wait than there are sequences.

    async def main() -> None:
        head = HeadSettings(name="tiny", model_len_max=2048, max_num_seqs=count)
        async with staged_site(tiny(), ("0-1", "2-3"), pipeline=hand_over(True), head=head, limit=count) as site:
            asking = asyncio.ensure_future(site.post("/v1/completions", {**ENDLESS, "n": count}))
            old = site.replicas[1].pop()
            new = await site.add(1, limit=count)
            pipeline = site.engine.pipeline
            await until(lambda: sum(len(each.tokens) > 4 for each in pipeline.running) == count)
            site.tell()
            await until(lambda: new.service.kv.sequences == count and old.service.kv.sequences == 0)
            assert pipeline.losses == pipeline.replayed_tokens == 0
            assert len(pipeline.running) == count
            pipeline._give_up(next(iter(pipeline.running)), "as a test")
            await asking

    asyncio.run(main())


def test_the_others_go_on_where_they_are_meanwhile() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3"), pipeline=hand_over(True)) as site:
            asking = asyncio.ensure_future(site.post("/v1/completions", {**ENDLESS, "n": 20}))
            site.replicas[1].pop()
            new = await site.add(1)
            pipeline = site.engine.pipeline
            await until(lambda: sum(len(each.tokens) > 4 for each in pipeline.running) == 20)
            new.hold()
            site.tell()
            await until(lambda: bool(pipeline._handovers))
            going = [each for each in pipeline.running if each not in pipeline._handovers]
            assert len(going) == 20 - HANDOVERS_AT_ONCE
            before = [len(each.tokens) for each in going]
            await until(lambda: all(len(each.tokens) > was for each, was in zip(going, before, strict=True)))
            assert len(pipeline._handovers) == HANDOVERS_AT_ONCE
            pipeline._give_up(going[0], "as a test")
            await asking

    asyncio.run(main())


def test_where_its_target_is_taken_out_as_well_it_is_computed_again_elsewhere() -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pipeline=hand_over(True), pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.gather(*(site.complete(prompt, TOKENS) for prompt in PROMPTS))
            old = site.replicas[1].pop()
            await until(lambda: old.service.totals.steps > 4)
            await site.add(1)
            await until(lambda: old.service.kv.sequences == len(PROMPTS))
            old.hold()
            site.tell()
            pipeline = site.engine.pipeline
            await until(lambda: len(pipeline._handovers) == len(PROMPTS))
            site.replicas[1].pop()
            await site.add(1)
            site.tell()
            async with asyncio.timeout(60.0):
                assert await asking == recorded("llama")
            assert pipeline.replayed_tokens >= sum(map(len, PROMPTS))

    asyncio.run(main())


@pytest.mark.parametrize("stage_first", [True, False])
def test_a_drain_has_one_end_whoever_hears_of_it_first(stage_first: bool) -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), replicas=(2,)) as site:
            pipeline, ends = site.engine.pipeline, []
            pipeline._call_later = lambda later_s, end: ends.append(end)
            replica = pipeline.replicas[0][0]
            replica.sequences.add(None)  # type: ignore[arg-type]  # It has something to do.
            for by_stage in (stage_first, not stage_first, stage_first):
                if by_stage:
                    replica._received(Draining(), memoryview(b""))
                else:
                    pipeline.set_replicas([[pipeline.replicas[0][1].address]])
            assert replica.draining
            assert replica.leaving
            assert len(ends) == 1
            replica.sequences.clear()

    asyncio.run(main())


class FullKv(KvStore):
    """It takes nothing that is handed over."""

    def write(self, key: Any, begin: int, end: int, given: Any) -> str:
        return "KV is full"


def test_a_target_without_room_computes_it_again() -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pipeline=hand_over(True), pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.ensure_future(site.complete(PROMPTS[0], TOKENS))
            old = site.replicas[1].pop()
            await until(lambda: old.service.totals.steps > 4)
            new = await site.add(1)
            layers = new.service.layers
            new.service.kv = FullKv(layers.architecture, 2, capacity_tokens=9999, dtype=layers.dtype, device="cpu")
            site.tell()
            assert await asking == recorded("llama")[0]
            assert site.engine.pipeline.replayed_tokens >= len(PROMPTS[0])
            assert site.engine.pipeline.handed_over_tokens == 0

    asyncio.run(main())


class BrokenKv(KvStore):
    """Reading it fails in a way that nobody has thought of."""

    def read(self, key: Any, begin: int, end: int) -> Any:
        raise KeyError(key)


def test_a_stage_that_cannot_go_on_says_so_and_does_not_just_answer_pings() -> None:
    async def main() -> None:
        async with staged_site(tiny(), SPLIT, pipeline=hand_over(True), pace=Pace(fixed_s=0.004)) as site:
            asking = asyncio.ensure_future(site.complete(PROMPTS[0], TOKENS))
            old = site.replicas[1].pop()
            await until(lambda: old.service.totals.steps > 4)
            errors: list[Exception] = []
            old.service.failed = errors.append
            old.service.kv.__class__ = BrokenKv
            await site.add(1)
            site.tell()
            await until(lambda: bool(errors))
            await old.die()  # As its process ends.
            assert await asking == recorded("llama")[0]

    asyncio.run(main())


def figures(**known: float) -> ReplicaFigures:
    return ReplicaFigures(calls=9, **known)  # type: ignore[arg-type]


class Of:
    """A replica's figures."""

    stage = 1

    def __init__(self, known: ReplicaFigures) -> None:
        self.figures = known


@pytest.mark.parametrize(
    ("token_bytes", "token_s", "quicker"),
    [(32 << 10, 1e-3, True), (32 << 10, 1e-5, False), (1 << 10, 1e-5, True)],
)
def test_the_estimate_weighs_bytes_against_computing(token_bytes: int, token_s: float, quicker: bool) -> None:
    both = figures(step_s=0.01, token_s=token_s, hop_s=1e-3)
    handover = Handover(
        sequence=None,  # type: ignore[arg-type]
        source=Of(both),  # type: ignore[arg-type]
        target=Of(both),  # type: ignore[arg-type]
        length=4000,
        part=handing.part_tokens(token_bytes),
        token_bytes=token_bytes,
        until_s=0.0,
    )
    assert (handover.seconds(500e6) < replay_s([[both], [both, both]], 4000, 512)) == quicker
    assert handover.measured(500e6, 2 * handover.part_bytes / 100e6 + 0.02) == pytest.approx(420e6, rel=0.01)
