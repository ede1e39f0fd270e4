"""The status of a ChironModel: what became of it and how it is doing, written when that changes and not too often."""

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
from chiron.fleet.kubernetes.testing.api import FakeKubernetes, Refusal
from chiron.gateway.chiron_models.objects import ModelResource, Reading
from chiron.gateway.chiron_models.writer import FORBIDDEN_PAUSE_S, TRIES_MAX, Seen, StatusWriter, seen
from chiron.gateway.reporting.status import StatusSources
from kubernetes_site import chiron_model
from live_plane_factory import MODEL, WALL_S, LivePlane

PERIOD_S = 10.0


class Leading:
    """A control plane that serves ``m0``."""

    def __init__(self, per_s: float = 5.0) -> None:
        live = LivePlane()
        live.rush(10.0 if per_s > 5.0 else 2.0, per_s=per_s)
        self.plane, self.journal = live.plane, live.journal

    def around(self) -> StatusSources:
        return StatusSources(wall_origin_s=WALL_S)


class Desk:
    """A writer with its clock, before an API in memory."""

    def __init__(self, fake: FakeKubernetes, client: Client) -> None:
        self.fake = fake
        self.now_s = 0.0
        self.seen: dict[str, Seen] = {}
        self.refused: dict[str, str] = {}
        self.in_force: dict[str, ModelResource] = {}
        self.writer = StatusWriter(
            client, wall_s=lambda: WALL_S + self.now_s, time_s=lambda: self.now_s, period_s=PERIOD_S
        )
        self.leading = Leading()

    def make(self, name: str, **spec: Any) -> str:
        """Its uid."""
        item = self.fake.apply(chiron_model(name, "d", **spec))
        found = seen(item)
        self.seen[found.resource.uid] = found
        self.in_force[found.resource.uid] = found.resource
        return found.resource.uid

    def seen_as(self, name: str) -> str:
        return next(uid for uid, each in self.seen.items() if each.resource.name == name)

    async def write(self) -> int:
        """How many requests that took."""
        before = len(self.fake.requests)
        config = ResourceReader("[kubernetes]\n", directory=Path()).read([]).config
        reading = Reading(config=config, refused=self.refused, in_force=self.in_force)
        await self.writer.write(self.seen, reading, self.leading)
        return sum("/chironmodels/" in path for _, path in self.fake.requests[before:])

    async def until_events(self, count: int) -> list[tuple[str, str, str]]:
        """Type, reason and message of each."""
        async with asyncio.timeout(60.0):
            while len(found := self.fake.all("events")) < count:
                await asyncio.sleep(0.01)
        return [(each["type"], each["reason"], each["message"]) for each in found]

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.fake.get("chironmodels", name).get("status", {})
        return found


def told(story: Callable[[Desk], Awaitable[None]]) -> None:
    async def run() -> None:
        async with FakeKubernetes() as fake:
            client = Client(Access(url=fake.url))
            await story(Desk(fake, client))
            await client.close()

    asyncio.run(run())


def test_it_says_how_the_model_is_doing_and_why_another_was_refused() -> None:
    async def story(desk: Desk) -> None:
        desk.make(MODEL)
        desk.refused[desk.make("bad")] = "spec.kinds[0]: port is 0; it must be 1 to 65535"
        del desk.in_force[desk.seen_as("bad")]
        await desk.write()
        good, bad = desk.status(MODEL), desk.status("bad")
        ready = len(desk.leading.plane.snapshot().models[0].instances)
        assert (good["ready"] + good["starting"], good["planned"], good["observedGeneration"]) == (ready, ready, 1)
        assert {each["name"]: each["arrived"] for each in good["classes"]}["chat"] >= 1
        assert {each["type"]: each["status"] for each in good["conditions"]} == {"Accepted": "True", "Ready": "True"}
        assert set(bad) == {"observedGeneration", "conditions"}
        (condition,) = bad["conditions"]
        assert (condition["status"], condition["reason"]) == ("False", "Invalid")
        assert condition["message"].startswith("spec.kinds[0]: port is 0")

    told(story)


def test_one_that_was_renamed_to_what_cannot_be_shows_the_model_that_it_still_serves() -> None:
    async def story(desk: Desk) -> None:
        uid, other = desk.make("mine", model=MODEL), desk.make("other", model="another")
        asks = replace(desk.in_force[uid], generation=2, spec={**desk.in_force[uid].spec, "model": "another"})
        desk.seen[uid].resource = asks
        desk.refused[uid] = "spec.model: 'another' is a model of ChironModel other already; generation 1 stays in force"
        late = desk.make("late")
        del desk.in_force[late]
        await desk.write()
        assert (desk.status("mine")["model"], desk.status("mine")["observedGeneration"]) == (MODEL, 2)
        assert "model" not in desk.status("other"), "this gateway does not serve it yet"
        assert desk.status("late") == {}, "nobody has read it"
        desk.refused[other] = "spec: no"
        del desk.in_force[other]
        await desk.write()
        assert set(desk.status("other")) == {"observedGeneration", "conditions"}

    told(story)


def test_it_is_written_only_when_it_has_changed_and_not_too_often_but_a_verdict_at_once() -> None:
    async def story(desk: Desk) -> None:
        uid = desk.make(MODEL)
        assert await desk.write() == 1
        assert await desk.write() == 0, "nothing has changed"
        since = desk.status(MODEL)["conditions"][0]["lastTransitionTime"]
        desk.fake.patch("chironmodels", MODEL, {"status": {"planned": 99}}, "status")
        desk.seen[uid].status = desk.status(MODEL)
        desk.seen[uid].version = desk.fake.get("chironmodels", MODEL)["metadata"]["resourceVersion"]
        assert await desk.write() == 0, "it was written just now"
        desk.now_s += PERIOD_S
        assert await desk.write() == 1
        assert desk.status(MODEL)["planned"] != 99
        assert desk.status(MODEL)["conditions"][0]["lastTransitionTime"] == since
        desk.refused[uid] = "spec.x: no; generation 1 stays in force"
        assert await desk.write() == 1
        assert desk.status(MODEL)["ready"] >= 0, "what is in force is still served"

    told(story)


def test_a_verdict_and_a_decision_are_events_of_the_resource_each_once() -> None:
    async def story(desk: Desk) -> None:
        desk.leading = Leading(per_s=100.0)  # Which one instance cannot carry.
        good, bad = desk.make(MODEL), desk.make("bad")
        desk.refused[bad] = "spec: no"
        await desk.write()
        last = desk.status(MODEL)["lastDecision"]["text"]
        expected = {
            ("Normal", "Accepted", "the gateway serves it"),
            ("Normal", "Planned", last),
            ("Warning", "Invalid", "spec: no"),
        }
        assert set(await desk.until_events(3)) == expected
        # Another process, which knows the status, tells what is new only.
        for uid in (good, bad):
            desk.seen[uid] = seen(desk.fake.get("chironmodels", desk.seen[uid].resource.name))
        desk.refused[bad] = "spec: not that either"
        await desk.write()
        await desk.until_events(4)
        desk.refused[bad] = "spec: nor that"
        await desk.write()
        found = await desk.until_events(5)
        others = [("Warning", "Invalid", why) for why in ("spec: not that either", "spec: nor that")]
        assert sorted(found) == sorted([*expected, *others])
        assert {each["involvedObject"]["uid"] for each in desk.fake.all("events")} == {good, bad}

    told(story)


def test_a_status_of_others_that_makes_no_sense_is_written_over() -> None:
    async def story(desk: Desk) -> None:
        uid = desk.make(MODEL)
        nonsense = {"lastDecision": "x", "conditions": [7, {"type": ["Accepted"]}], "classes": {"a": 1}, "ready": "all"}
        desk.fake.patch("chironmodels", MODEL, {"status": nonsense}, "status")
        desk.seen[uid] = seen(desk.fake.get("chironmodels", MODEL))
        assert await desk.write() == 1
        assert desk.status(MODEL)["ready"] >= 0
        assert desk.status(MODEL)["conditions"][0]["status"] == "True"

    told(story)


def test_a_conflict_is_written_again_a_few_times() -> None:
    async def story(desk: Desk) -> None:
        uid = desk.make(MODEL)
        desk.fake.patch("chironmodels", MODEL, {"metadata": {"labels": {"a": "b"}}})  # Which was not heard yet.
        assert await desk.write() == 3, "refused, read, written"
        assert desk.status(MODEL)["planned"] >= 1
        desk.now_s += PERIOD_S
        desk.refused[uid] = "spec: no"
        conflict = Refusal(409, "Conflict", "changed")
        desk.fake.interfere = lambda method, path: conflict if method == "PATCH" else None
        assert await desk.write() == 2 * TRIES_MAX

    told(story)


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_write_it_pauses_and_tries_again(status: int) -> None:
    async def story(desk: Desk) -> None:
        desk.make(MODEL)
        desk.make("other")
        desk.fake.interfere = lambda method, path: Refusal(status, "Refused", "no")
        assert await desk.write() == 1
        assert await desk.write() == 0
        desk.now_s += FORBIDDEN_PAUSE_S
        desk.fake.interfere = lambda method, path: None
        assert await desk.write() == 2

    told(story)
