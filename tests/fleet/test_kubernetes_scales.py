"""How many replicas a workload is to have: asked for, marked, told of, and shared with whoever else scales it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from chiron.fleet.kubernetes.pods import DELETION_COST
from chiron.fleet.kubernetes.testing.api import Refusal
from fleet_factory import until
from kubernetes_site import DEPLOYMENTS, PODS, Cluster, every_cluster, workload
from pods_site import STATEFUL_SETS, Site, told


@every_cluster
def test_somebody_else_who_scales_is_noticed_and_not_fought(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2, 3)
        await here.ready(1, 2, 3)
        await here.cluster.set_replicas(4)
        await here.said("from 3 to 4")
        await here.cluster.until_ready(4)
        assert here.kind.found == 0, "it is theirs"
        here.create(4)  # Chiron needs another: there is one.
        await here.ready(4)
        assert await here.cluster.replicas() == 4
        # A cut: those who lose their pods hear of it while these still run, and no more than what is left is asked for.
        await here.cluster.set_replicas(2)
        await here.said("from 4 to 2")
        await until(lambda: len(here.heard.leaving) == 2, "two are told to leave")
        await here.failed(*here.heard.leaving)
        here.create(5, 6)
        assert here.kind.instances_max == 2
        await asyncio.sleep(0.3)
        assert await here.cluster.replicas() == 2
        # They give it back.
        await here.cluster.set_replicas(4)
        await here.ready(5, 6)
        assert here.kind.instances_max is None
        assert await here.cluster.replicas() == 4

    told(what, tmp_path, story, workload(replicas=0))


def test_after_a_while_chiron_asks_again_for_what_somebody_else_has_cut(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1, 2)
        await here.cluster.set_replicas(1)
        await until(lambda: len(here.heard.failed) == 1, "one is gone")
        here.create(3)
        await here.ready(3)
        assert await here.cluster.replicas() == 2

    told("fake", tmp_path, story, workload(replicas=0), yield_s=0.5)


@every_cluster
def test_where_another_scales_instances_wait_for_it_and_leave_marks_for_it(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1)
        await until(lambda: any("at 1 replicas; 2 are planned" in note for note in here.kind.notes), "it is said")
        assert await here.cluster.replicas() == 1
        await here.cluster.set_replicas(3)  # One more than anybody needs.
        await here.ready(1, 2)
        await here.cluster.until_ready(3)
        assert not any("somebody else" in note for note in here.kind.notes)
        victim = await here.pod_of(1)
        spare = (await here.cluster.ready() - {victim, await here.pod_of(2)}).pop()
        here.remove(1)

        async def marked() -> bool:
            pods = {pod["metadata"]["name"]: pod["metadata"] for pod in await here.cluster.pods()}
            costs = {name: int(meta.get("annotations", {}).get(DELETION_COST, 0)) for name, meta in pods.items()}
            return {name for name, cost in costs.items() if cost < 0} == {victim, spare}

        await until(lambda: here.kind.fewest == 1, "the others may go")
        assert await marked(), "both that are not needed are marked by then"
        assert await here.cluster.replicas() == 3
        await here.cluster.set_replicas(1)
        await here.cluster.until_ready(1)
        assert await here.cluster.ready() == {await here.pod_of(2)}
        assert not here.heard.failed
        # A cut below the plan is waited out, not fought.
        await here.cluster.set_replicas(0)
        await until(lambda: here.heard.failed, "its pod is gone")
        assert here.kind.instances_max is None

    told(what, tmp_path, story, workload(replicas=1), scaler="external")


async def scale_reads_meanwhile(here: Cluster) -> int:
    """How often the scale is read during thirty other requests, on the same loop as all else."""
    assert here.fake is not None
    here.fake.requests.clear()
    for _ in range(30):
        await here.pods()
    return sum(1 for method, path in here.fake.requests if method == "GET" and path.endswith("/scale"))


def test_a_number_that_has_to_wait_is_not_asked_for_in_a_loop(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1, 2)
        numbers = {await here.pod_of(number): number for number in (1, 2)}
        here.remove(numbers["engine-0"])
        await until(lambda: here.heard.leaving == [numbers["engine-1"]], "the last one has to move")
        assert await scale_reads_meanwhile(here.cluster) < 5

    told("fake", tmp_path, story, workload("StatefulSet"), path=STATEFUL_SETS, workload="statefulset")


def test_advice_for_more_than_runs_is_not_asked_for_in_a_loop(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1)
        assert await scale_reads_meanwhile(here.cluster) < 5

    told("fake", tmp_path, story, workload(replicas=1), advise=True)


def test_fewer_replicas_wait_until_pods_are_watched_again_and_no_longer(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        here.create(1, 2)
        await here.ready(1, 2)
        fake.interfere = lambda method, path: Refusal(503, "", "busy") if path == PODS else None
        fake.cut_watches()
        await here.said("its pods cannot be watched")
        here.remove(2)
        await until(lambda: fake.requests[-1][1].endswith("/scale"), "it looks")
        fake.interfere = lambda method, path: None

        async def scaled() -> bool:
            fake.bookmark()  # Nothing else is heard: no pod changes.
            return fake.get("deployments", "engine")["spec"]["replicas"] == 1

        await here.cluster.until(scaled, "one is left")

    told("fake", tmp_path, story, workload())


@every_cluster
def test_events_on_the_workload_say_how_it_was_scaled_and_why(what: str, tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        here.create(1, 2)
        await here.ready(1, 2)
        up = ("ScaledUp", "0 -> 2 replicas: the load of engine")
        await here.told_of(up)
        here.remove(2)
        await here.cluster.until_ready(1)
        down = ("ScaledDown", "2 -> 1 replicas: the load of engine")
        await here.told_of(up, down)
        await here.cluster.set_replicas(3)
        others = ("ScaledByOthers", "somebody else has scaled it from 1 to 3 replicas")
        await here.told_of(up, down, others)
        workload_itself = await here.cluster.client.get(f"{DEPLOYMENTS}/engine")
        for event in await here.events():
            about = event["involvedObject"]
            assert (about["kind"], about["uid"]) == ("Deployment", workload_itself["metadata"]["uid"])
            assert event["type"] == ("Warning" if event["reason"] == "ScaledByOthers" else "Normal")

    told(what, tmp_path, story, workload(replicas=0))


def test_events_tell_whoever_scales_in_chirons_place_of_the_plan_and_advice_writes_none(tmp_path: Path) -> None:
    async def follows(here: Site) -> None:
        here.create(1)
        await here.ready(1)
        here.create(2)
        plan = "2 instances are planned, where 1 replicas are asked for: the load of engine"
        await here.told_of(("Planned", plan))

    async def advises(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        here.create(1, 2)
        await here.ready(1)
        await here.cluster.set_replicas(2)
        await here.ready(2)
        assert not any(method != "GET" and "/events" in path for method, path in fake.requests)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    told("fake", tmp_path / "a", follows, workload(replicas=1), scaler="external")
    told("fake", tmp_path / "b", advises, workload(replicas=1), advise=True)


def test_conflicts_are_tried_again_and_refusals_are_said(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        left = [3]

        def conflict(method: str, path: str) -> Refusal | None:
            if method == "PUT" and left[0]:
                left[0] -= 1
                return Refusal(409, "Conflict", "the object has been modified")
            return None

        fake.interfere = conflict
        here.create(1)
        await here.ready(1)
        assert left == [0]
        fake.interfere = lambda method, path: Refusal(403, "Forbidden", "no scale") if method == "PUT" else None
        here.create(2)
        await here.said("403 Forbidden: no scale")
        await until(lambda: here.kind.trouble is not None, "clients hear of it")
        trouble = here.kind.trouble
        assert trouble is not None
        assert trouble.reason == "the cluster does not let Chiron scale it"
        fake.interfere = lambda method, path: None
        await here.ready(2)

    told("fake", tmp_path, story, workload(), start_timeout_s=0.2)


def test_advice_writes_nothing_and_takes_in_whatever_runs(tmp_path: Path) -> None:
    async def story(here: Site) -> None:
        fake = here.cluster.fake
        assert fake is not None
        fake.requests.clear()
        here.create(1)
        await here.ready(1)
        await until(lambda: here.kind.found == 1, "the other is found")
        here.create(2)
        await here.ready(2)
        await here.cluster.set_replicas(3)
        await until(lambda: here.kind.found == 1, "and the one that an autoscaler adds")
        here.create(3, 4)  # One more than there is.
        await here.ready(3)
        await here.cluster.set_replicas(4)
        await here.ready(4)
        assert here.kind.found == 0
        here.remove(4)
        await asyncio.sleep(0.1)
        mine = [each for each in fake.requests if each[0] != "GET" and "/scale" in each[1]]
        assert len(mine) == 2, "the test's own"
        assert await here.cluster.replicas() == 4

    told("fake", tmp_path, story, workload(replicas=2), advise=True)
