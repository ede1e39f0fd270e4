"""ChironModels of a namespace: what changes is taken up, what cannot be is told, and silence changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chiron.config.chiron_models import ResourceReader
from chiron.fleet.kubernetes.access import Access
from chiron.fleet.kubernetes.client import Client
from chiron.fleet.kubernetes.testing.api import RESOURCES, FakeKubernetes, Refusal
from chiron.gateway.chiron_models.follower import Follower, FollowSettings, _next_pause_s, read_first
from chiron.gateway.chiron_models.kept import (
    FILE,
    content_of,
    read_content,
    read_kept,
    read_record,
    write_kept,
)
from chiron.gateway.chiron_models.objects import read_resource
from chiron.gateway.reporting.status import StatusSources
from chiron.gateway.settings import KubernetesModelsSettings
from chiron.store.port import StoreUnavailable
from kubernetes_site import MODELS, chiron_model
from live_plane_factory import WALL_S, LivePlane
from real_kubernetes import kubeconfig


class Leading:
    """A control plane that serves none of them."""

    def __init__(self) -> None:
        live = LivePlane()
        self.plane, self.journal = live.plane, live.journal

    def around(self) -> StatusSources:
        return StatusSources(wall_origin_s=WALL_S)


class Followed:
    """A follower, before an API in memory."""

    def __init__(self, fake: FakeKubernetes, client: Client, data: Path, *, shared: bool = False) -> None:
        self.fake = fake
        self.client = client
        self.kept = data / FILE
        self.changed = asyncio.Event()
        self.follower = Follower(
            client=client,
            namespace="default",
            reader=ResourceReader("[kubernetes]\n", directory=data),
            kept=self.kept,
            changed=self.changed.set,
            wall_s=lambda: WALL_S,
            shared=shared,
            settings=FollowSettings(settle_s=0.01, restart_pause_s=0.01, status_period_s=0.01, confirm_s=0.01),
        )
        if not shared:
            self.follower.lead(Leading())

    async def until(self, condition: Callable[[], object], what: str) -> None:
        async with asyncio.timeout(60.0):
            while not condition():
                await asyncio.sleep(0.01)
        assert condition(), what

    def delete(self, name: str) -> None:
        resource = next(each for each in RESOURCES if each.plural == "chironmodels")
        self.fake.delete(resource, self.fake.get("chironmodels", name))

    def in_force(self) -> list[tuple[str, int]]:
        return [(each.name, each.generation) for each in read_kept(self.kept) or ()]

    def message(self, name: str) -> str:
        conditions = self.fake.get("chironmodels", name).get("status", {}).get("conditions", [])
        return next((str(each["message"]) for each in conditions if each["type"] == "Accepted"), "")


def followed(
    data: Path, story: Callable[[Followed], Awaitable[None]], *before: dict[str, Any], shared: bool = False
) -> None:
    async def run() -> None:
        async with FakeKubernetes() as fake:
            for item in before:
                fake.apply(item)
            config = kubeconfig(data / "kubeconfig", fake.url)
            reader = ResourceReader("[kubernetes]\n", directory=data)
            await read_first(KubernetesModelsSettings(kubeconfig=str(config)), reader, data)
            client = Client(Access(url=fake.url))
            here = Followed(fake, client, data, shared=shared)
            task = asyncio.get_running_loop().create_task(here.follower.run())
            try:
                await story(here)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await client.close()

    asyncio.run(run())


def test_what_changes_is_in_force_for_the_next_brain_and_what_cannot_be_is_only_told(tmp_path: Path) -> None:
    async def story(here: Followed) -> None:
        assert here.in_force() == [("a", 1)]
        here.fake.apply(chiron_model("bad", "b", minInstances=9))
        await here.until(lambda: "minInstances is 9" in here.message("bad"), "it is told")
        here.fake.patch("chironmodels", "a", {"metadata": {"labels": {"x": "y"}}})
        here.fake.patch("chironmodels", "a", {"spec": {"minInstances": 9}})
        await here.until(lambda: "generation 1 stays in force" in here.message("a"), "the last one is served")
        assert (here.changed.is_set(), here.in_force()) == (False, [("a", 1)])
        here.fake.patch("chironmodels", "a", {"spec": {"minInstances": 2}})
        await here.until(here.changed.is_set, "another brain is asked for")
        assert here.in_force() == [("a", 3)]

    followed(tmp_path, story, chiron_model("a", "a"))


def test_one_that_was_deleted_is_in_force_no_more_but_not_for_an_api_server_that_is_away(tmp_path: Path) -> None:
    async def story(here: Followed) -> None:
        gone = Refusal(404, "NotFound", "the server could not find the requested resource")
        asked = len(here.fake.requests)
        here.fake.interfere = lambda method, path: gone
        here.fake.expire()
        here.fake.cut_watches()
        await here.until(lambda: len(here.fake.requests) > asked + 3, "it is asked again and again")
        assert (here.changed.is_set(), here.in_force()) == (False, [("a", 1), ("b", 1)])
        here.fake.interfere = lambda method, path: None
        await here.client.delete(f"{MODELS}/a")
        await here.until(here.changed.is_set, "another brain is asked for")
        assert here.in_force() == [("b", 1)]

    followed(tmp_path, story, chiron_model("a", "a"), chiron_model("b", "b"))


def test_what_goes_with_the_definition_stays_until_there_is_a_resource_again(tmp_path: Path) -> None:
    async def story(here: Followed) -> None:
        gone = Refusal(404, "NotFound", "the server could not find the requested resource")
        await here.until(lambda: here.message("a") and here.message("b"), "they are followed")
        asked = len(here.fake.requests)
        here.fake.interfere = lambda method, path: gone
        for name in ("a", "b"):
            here.delete(name)  # The API server tells so of each.
        await here.until(lambda: len(here.fake.requests) > asked + 3, "it is asked, and has no such resources")
        here.fake.interfere = lambda method, path: None
        asked = len(here.fake.requests)
        await here.until(lambda: len(here.fake.requests) > asked, "there are none")
        assert (here.changed.is_set(), here.in_force()) == (False, [("a", 1), ("b", 1)])
        here.fake.apply(chiron_model("a", "a"))
        await here.until(here.changed.is_set, "another brain is asked for")
        assert here.in_force() == [("a", 1)]

    followed(tmp_path, story, chiron_model("a", "a"), chiron_model("b", "b"))


@pytest.mark.parametrize(
    ("ago_s", "last_s", "pause_s"),
    [(3.0, 5.0, 10.0), (10.5, 5.0, 5.0), (100.0, 80.0, 160.0), (100.0, 280.0, 300.0), (-1.0, 5.0, 5.0)],
)
def test_brains_live_longer_while_somebody_edits(ago_s: float, last_s: float, pause_s: float, tmp_path: Path) -> None:
    write_kept(tmp_path / FILE, content_of([], changed_s=1000.0 - ago_s, pause_s=last_s))
    assert _next_pause_s(read_record(tmp_path / FILE), 1000.0, FollowSettings()) == pause_s


def test_of_several_gateways_only_the_leader_takes_changes_up_and_tells_the_others_first(tmp_path: Path) -> None:
    async def story(here: Followed) -> None:
        saved: list[bytes] = []
        away = True

        async def save(content: bytes) -> None:
            if away:
                raise StoreUnavailable("away")
            assert read_kept(here.kept) == before, "it is told first"
            saved.append(content)

        before = read_kept(here.kept)
        here.fake.patch("chironmodels", "a", {"spec": {"minInstances": 2}})
        asked = len(here.fake.requests)
        here.fake.cut_watches()
        await here.until(lambda: len(here.fake.requests) > asked + 1, "it is followed")
        await asyncio.sleep(0.1)
        assert (here.changed.is_set(), here.in_force()) == (False, [("a", 1)])
        # Another gateway had led, and had another version in force.
        other = replace(before[0], generation=7, spec={**before[0].spec, "minInstances": 3}) if before else None
        assert other is not None
        write_kept(here.kept, content_of([other]))
        before = read_kept(here.kept)
        here.follower.lead(Leading(), save)
        await asyncio.sleep(0.1)
        assert (here.changed.is_set(), here.in_force()) == (False, [("a", 7)]), "the store is away"
        away = False
        await here.until(here.changed.is_set, "another brain is asked for")
        assert here.in_force() == [("a", 2)]
        assert saved == [here.kept.read_bytes()]

    followed(tmp_path, story, chiron_model("a", "a"), shared=True)


def test_what_is_in_force_is_told_also_if_nothing_has_changed(tmp_path: Path) -> None:
    async def story(here: Followed) -> None:
        saved: list[bytes] = []

        async def save(content: bytes) -> None:
            saved.append(content)

        here.follower.lead(Leading(), save)
        await here.until(lambda: saved, "a gateway that joins has to know")
        here.fake.apply(chiron_model("bad", "b", minInstances=9))
        await here.until(lambda: "minInstances is 9" in here.message("bad"), "it is told")
        assert [each.name for each in read_content(saved[0]).resources] == ["a"]
        assert (len(saved), here.changed.is_set()) == (1, False)

    followed(tmp_path, story, chiron_model("a", "a"), shared=True)


def test_a_file_that_is_damaged_is_none(tmp_path: Path) -> None:
    path = tmp_path / FILE
    for text in ("", "{", "[]", '{"resources": [{}]}', '{"resources": [{"metadata": {"name": "A"}, "spec": {}}]}'):
        path.write_text(text)
        assert read_kept(path) is None


def test_a_spec_that_cannot_be_kept_is_refused_where_its_author_reads_it(tmp_path: Path) -> None:
    async def story(here: Followed) -> None:
        here.fake.apply(chiron_model("large", "b", aliases=["x" * 1000] * 300))
        await here.until(lambda: "spec: it has 3" in here.message("large"), "it is told")
        here.fake.patch("chironmodels", "a", {"spec": {"aliases": ["x" * 1000] * 300}})
        await here.until(lambda: "generation 1 stays in force" in here.message("a"), "what was stays")
        assert (here.changed.is_set(), here.in_force()) == (False, [("a", 1)])

    followed(tmp_path, story, chiron_model("a", "a"))


def test_a_spec_too_deep_to_be_kept_is_none() -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"a": deep}
    head = {"name": "m", "namespace": "llm", "uid": "1234"}
    read = read_resource({"metadata": head, "spec": deep})
    assert read.flaw.startswith("spec: it cannot be kept")
    assert read.spec == {}
