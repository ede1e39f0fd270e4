"""``GET /chiron/desired``: how many instances there should be, or why there is no number."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from math import inf, nan
from pathlib import Path

import pytest

from chiron.control.snapshot import InstanceSnapshot, ModelSnapshot, PlaneSnapshot, QueueSnapshot
from chiron.core.types import InstanceKind, ModelSpec, Role, State
from chiron.fleet.port import FleetReport, KindReport
from chiron.gateway.relay.keys import hash_secret
from chiron.gateway.reporting.desired import PLAN_AGE_MAX_S, Desired, desired
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.status import StatusSources
from chiron.policies.views import FleetView, ModelPlan
from scripted_engine import ScriptedEngine, before

ADMIN = {"authorization": "Bearer root"}


def kind(name: str, *, most: int = 10, gpus: int = 1, gpu: str = "") -> InstanceKind:
    return InstanceKind(
        name=name,
        gpu=gpu or name,
        gpus=gpus,
        price_per_gpu_hour=1.0,
        kv_capacity_tokens=1000,
        max_num_seqs=8,
        max_instances=most,
    )


def model(
    kinds: list[InstanceKind], live: Mapping[str, int], *, planned: int, advised: int | None, draining: int = 0
) -> ModelSnapshot:
    def instance(number: int, kind: InstanceKind, state: State) -> InstanceSnapshot:
        return InstanceSnapshot(
            id=number,
            model="m",
            kind=kind,
            role="mixed",
            state=state,
            began_s=0.0,
            age_s=0.0,
            max_batch_size=8,
            running_interactive=0,
            running_batch=0,
            waiting=0,
            kv_used_tokens=0,
            kv_usage=0.0,
            itl_s=nan,
            kv_capacity_tokens=1000,
            itl_slo_s=inf,
            sample_age_s=inf,
        )

    instances = [instance(i, each, "ready") for each in kinds for i in range(live.get(each.name, 0))]
    counts: dict[Role, int] = {"interactive": 0, "mixed": planned, "batch": 0}
    return ModelSnapshot(
        spec=ModelSpec(name="m", kinds=tuple(kinds), min_instances=0),
        classes={},
        planned=counts,
        advised={} if advised is None else {"mixed": advised},
        cold_start_s=1.0,
        cold_starts_seen=0,
        start_s={},
        instances=(*instances, *(instance(99 + i, kinds[-1], "draining") for i in range(draining))),
        running={},
        queue=QueueSnapshot(interactive=0, oldest_wait_s=inf, batch=0, batch_announced=0, groups=()),
    )


def asked(
    found: ModelSnapshot,
    *,
    gpus: Mapping[str, int] | None = None,
    fleet: Mapping[str, KindReport] | None = None,
    planned: bool = True,
    now_s: float = 10.0,
) -> Desired:
    journal = LiveJournal()
    if planned:
        plan = ModelPlan(counts={"mixed": 1}, reason="interactive_load", numbers={"load": 2.5})
        journal.observe(FleetView(now_s=10.0, since_s=5.0, models=(), gpus_max={}), {"m": plan})
    around = StatusSources(gpus_max=gpus or {}, fleet=FleetReport(kinds=fleet or {}))
    plane = PlaneSnapshot(now_s=now_s, policy="chiron", open_requests=0, evictions=0, migrations=0, models=(found,))
    (only,) = desired(plane, journal, around)
    return only


A, B = kind("a"), kind("b")


@pytest.mark.parametrize(
    ("live", "planned", "advised", "limits", "counts"),
    [
        ({"a": 2}, 2, None, {}, {"a": 2, "b": 0}),
        ({"a": 2}, 5, None, {}, {"a": 5, "b": 0}),
        # Advice beside a fleet that somebody else scales.
        ({"a": 5}, 5, 2, {}, {"a": 2, "b": 0}),
        ({"a": 1, "b": 2}, 3, 1, {}, {"a": 1, "b": 0}),
        ({"a": 1, "b": 2}, 3, 0, {}, {"a": 0, "b": 0}),
        # One kind can have no more now.
        ({"a": 2}, 4, None, {"a": 2}, {"a": 2, "b": 2}),
        # None can: the first is tried.
        ({"a": 1}, 2, None, {"a": 0, "b": 0}, {"a": 2, "b": 0}),
        # More than all kinds may have.
        ({"a": 10}, 30, None, {}, {"a": 10, "b": 10}),
    ],
)
def test_a_plan_is_split_into_kinds_as_chiron_would_scale_them(
    live: Mapping[str, int], planned: int, advised: int | None, limits: Mapping[str, int], counts: Mapping[str, int]
) -> None:
    fleet = {name: KindReport(instances_max=most) for name, most in limits.items()}
    found = asked(model([A, B], live, planned=planned, advised=advised), fleet=fleet)
    assert found.kinds == counts
    assert found.total == sum(counts.values())
    assert (found.reason, found.numbers) == ("interactive_load", {"load": 2.5})


def test_the_number_falls_once_instances_have_been_drained_and_whoever_takes_pods_knows_which() -> None:
    planned = model([A, B], {"a": 1}, planned=1, advised=None, draining=2)
    assert asked(planned).kinds == {"a": 1, "b": 2}
    assert asked(planned, fleet={"a": KindReport(fewest=3), "b": KindReport(fewest=1)}).kinds == {"a": 3, "b": 2}


def test_no_more_gpus_are_asked_for_than_there_may_be() -> None:
    big, small = kind("big", gpus=4, gpu="h100"), kind("small", gpus=1, gpu="h100")
    found = asked(model([big, small], {"big": 1}, planned=9, advised=None), gpus={"h100": 10})
    assert found.kinds == {"big": 2, "small": 2}


def test_there_is_no_number_that_nobody_stands_behind() -> None:
    running = model([A, B], {"a": 3}, planned=3, advised=None)
    for found, why in (
        (asked(running, planned=False), "nothing has been decided yet"),
        (asked(running, fleet={"b": KindReport(known=False)}), "what runs of b is not known yet"),
        (asked(running, now_s=11.0 + PLAN_AGE_MAX_S), f"nothing has been decided for {1 + PLAN_AGE_MAX_S:.0f} s"),
    ):
        assert (found.total, found.kinds, found.unknown) == (None, {}, why)


def test_the_page_answers_for_all_for_one_model_and_for_one_kind(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        changes = [f"admin_key_hash={hash_secret(b'root')}", "policy=seldom"]
        extra = '[policies.seldom]\npolicy = "chiron"\ntick = "1d"\n'
        async with before(tmp_path, engine, extra=extra, changes=changes) as (service, client):

            async def get(query: str, headers: Mapping[str, str] = ADMIN) -> tuple[int, dict[str, object]]:
                answer = await client.fetch("GET", f"/chiron/desired{query}", headers=headers)
                return answer.status, json.loads(answer.body)

            status, page = await get("?model=m")
            assert (status, page) == (503, {"status": "nothing has been decided yet"})
            assert b"chiron_instances_desired{" not in service._render_metrics()
            plan = ModelPlan(counts={"mixed": 1}, reason="interactive_load")
            now_s = service.clock.elapsed_s()
            service.journal.observe(FleetView(now_s=now_s, since_s=0.0, models=(), gpus_max={}), {"m": plan})
            status, page = await get("")
            (about,) = page["models"]  # type: ignore[misc]
            assert (status, about["model"], about["desired"], about["ready"]) == (200, "m", 1, 1)  # type: ignore[index]
            assert (await get("?model=m"))[1]["desired"] == 1
            name = service.config.models[0].kinds[0].kind.name
            status, page = await get(f"?model=m&kind={name}")
            assert (status, page["kind"], page["desired"]) == (200, name, 1)
            assert page["why"]
            line = f'chiron_instances_desired{{kind="{name}",model="m"}} 1.0'
            assert line.encode() in service._render_metrics()
            assert (await get("?model=x"))[0] == 404
            status, page = await get("?model=m&kind=x")
            assert (status, name in json.dumps(page)) == (404, True)
            status, page = await get(f"?kind={name}")
            assert (status, "without model" in json.dumps(page)) == (404, True)
            assert (await get("", {}))[0] == 401

    asyncio.run(main())
