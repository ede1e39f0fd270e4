"""Instances on a Ray cluster: placed, lost, taken over, and never touched when they are somebody else's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from child_processes import children
from chiron.fleet.port import FleetEnvironment, KindReport, Memory
from chiron.fleet.ray.cluster import Answer, Question, RayCluster, RayError, new_name, read_name
from chiron.fleet.ray.fleet import RayFleet
from chiron.fleet.ray.instances import RayInstances, RayTimes
from chiron.fleet.ray.places import FILE, NAME, from_bytes, read_places
from chiron.fleet.ray.source import RaySource
from chiron.fleet.ray.testing import MemoryRay
from chiron.net.clock import LiveClock
from fleet_factory import STUB, Heard, alive, an_instance, kill, quick_settings, until

QUICK = RayTimes(
    quick_s=0.01,
    calm_s=0.02,
    backoff_first_s=0.02,
    backoff_max_s=0.05,
    settle_s=0.05,
    other_s=0.05,
    patience_s=1.0,
    unknown_s=0.2,
)
SOURCE = RaySource(command=(*STUB, "--announce"), resources={"GPU": 1.0}, stop_timeout_s=5.0, start_timeout_s=60.0)


class Shared:
    """Implements ``Memory``."""

    def __init__(self) -> None:
        self.saved: dict[str, bytes] = {}

    async def load(self, name: str) -> bytes | None:
        return self.saved.get(name)

    async def save(self, name: str, data: bytes) -> None:
        self.saved[name] = data

    @property
    def namespaces(self) -> set[str]:
        return {place.namespace for place in from_bytes(self.saved.get(NAME, b"[]"), NAME)}


class Sometimes:
    """Implements ``RayCluster``: one that answers while ``answers`` says so."""

    def __init__(self, cluster: RayCluster, answers: Callable[[], bool]) -> None:
        self._cluster = cluster
        self._answers = answers

    async def ask(self, question: Question) -> Answer:
        if not self._answers():
            raise RayError("the agent hangs")
        return await self._cluster.ask(question)

    async def close(self) -> None:
        await self._cluster.close()


class Site:
    """A cluster in memory, and the gateways before it."""

    def __init__(self, directory: Path, lease_s: float) -> None:
        self.ray = MemoryRay({"a": {"GPU": 1.0}, "b": {"GPU": 1.0}}, directory, lease_s=lease_s)
        self.elsewhere: dict[str, MemoryRay] = {}
        """Other clusters, by address."""
        self.silent: set[str] = set()
        """Addresses at which nobody answers."""
        self.notes: list[str] = []
        self.directory = directory
        self._stack = contextlib.AsyncExitStack()

    def gateway(
        self,
        *,
        advise: bool = False,
        kind: str = "stub",
        source: RaySource = SOURCE,
        also: Mapping[str, RaySource] | None = None,
        owner: str = "",
        spare_s: float = 600.0,
        settle_s: float = 0.0,
        grace_s: float = 0.0,
        memory: Memory | None = None,
        directory: Path | None = None,
        none: bool = False,
    ) -> tuple[RayFleet, Heard]:
        clock = LiveClock(asyncio.get_running_loop())
        self._stack.callback(clock.stop)
        heard = Heard(clock)
        environment = FleetEnvironment(
            clock=clock,
            events=heard,
            log_directory=self.directory,
            settings=quick_settings(),
            owner=lambda: owner,
            directory=directory or self.directory,
            memory=memory,
            settle_s=settle_s,
            grace_s=grace_s,
            advise=advise,
            noted=lambda kind, text: self.notes.append(text),
        )
        sources, times = {} if none else {kind: source, **(also or {})}, replace(QUICK, spare_s=spare_s)
        fleet = RayFleet(sources, environment, connect=self._connect, times=times)
        self._stack.push_async_callback(fleet.close)
        return fleet, heard

    def _connect(self, source: RaySource) -> RayCluster:
        ray = self.elsewhere.get(source.address, self.ray)
        return Sometimes(ray.connect(source), lambda: source.address not in self.silent)

    @property
    def names(self) -> list[str]:
        return list(self.ray.instances)

    def pid(self, name: str = "") -> int:
        (pid,) = self.ray.engine_pids(name or self.names[0])
        return pid

    def engine(self, kind: str) -> int:
        (name,) = [name for name in self.names if f":{kind}:" in name]
        return self.pid(name)

    async def close(self) -> None:
        await self._stack.aclose()
        for ray in (self.ray, *self.elsewhere.values()):
            await ray.close()


def told(directory: Path, story: Callable[[Site], Coroutine[Any, Any, None]], lease_s: float = 600.0) -> None:
    async def run() -> None:
        site = Site(directory, lease_s)
        try:
            await story(site)
        finally:
            await site.close()

    asyncio.run(run())
    assert not children(), "nothing is left"


def report(fleet: RayFleet, kind: str = "stub") -> KindReport:
    return fleet.report().kinds[kind]


def die(fleet: RayFleet) -> None:
    """As by kill -9: nobody is told anything."""
    for task in fleet._running:
        task.cancel()


def test_one_that_finds_no_node_is_demand_until_there_is_one_or_it_is_taken_back(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(source=replace(SOURCE, resources={"GPU": 2.0}, absent_after_s=0.2))
        first, second = an_instance(1), an_instance(2)
        fleet.create(first)
        fleet.create(second)
        await until(lambda: len(site.names) == 2, "both are asked for")
        await until(lambda: report(fleet).instances_max == 0, "both count as absent")
        trouble = report(fleet).trouble
        assert trouble is not None
        assert trouble.reason == "no node of the cluster has room for it"
        assert "no node of the cluster is large enough: it needs GPU 2" in report(fleet).notes[0]
        assert not heard.failed, "neither is given up"
        site.ray.add_node("c", {"GPU": 2.0})
        await until(lambda: len(heard.ready) == 1, "one has a node")
        await until(lambda: report(fleet).instances_max == 1, "the other is still absent")
        assert "no node has room now: it needs GPU 2" in report(fleet).notes[0]
        fleet.remove(second if heard.ready == [1] else first)
        await until(lambda: len(site.names) == 1, "nobody needs it any more")
        assert report(fleet).instances_max is None

    told(tmp_path, story)


@pytest.mark.parametrize(
    ("end", "reason", "counts"),
    [
        (lambda site: kill(site.pid()), "its engine ended: it was killed by SIGKILL; last lines:", True),
        (lambda site: site.ray.lose_node("a"), "its node a is dead", False),
        pytest.param(
            lambda site: site.ray.lose_actor(site.names[0]),
            "it was killed by `ray.kill`",
            False,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda site: site.ray.instances.clear(), "its placement group is gone", False, marks=pytest.mark.slow
        ),
    ],
    ids=["engine", "node", "actor", "group"],
)
def test_the_end_of_an_engine_an_actor_or_a_node_is_told_in_words(
    end: Callable[[Site], None], reason: str, counts: bool, tmp_path: Path
) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        processes = next(iter(site.ray.instances.values())).processes
        end(site)
        await until(lambda: heard.failed == [1], "its end is noticed")
        assert reason in heard.reasons[1]
        await until(lambda: not site.names, "what it held in the cluster is given back")
        starts = report(fleet).starts
        assert starts is not None
        assert starts.failures_total == counts, "only an engine that ends is a failure of its kind"
        fleet.create(an_instance(2))
        await until(lambda: heard.ready == [1, 2], "another takes its place")
        await asyncio.gather(*(process.stop() for process in processes))

    told(tmp_path, story)


@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["stopped", "killed"])
def test_the_next_gateway_takes_over_what_runs(killed: bool, tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        for number in (1, 2):
            fleet.create(an_instance(number))
        await until(lambda: len(heard.ready) == 2, "ready")
        pids = {site.pid(name) for name in site.names}
        if killed:
            die(fleet)
        else:
            await fleet.close()
        later, heard_later = site.gateway()
        later.create(an_instance(7))  # At once, before it knows what runs.
        await until(lambda: heard_later.ready == [7], "taken over")
        await until(lambda: report(later).found == 1, "there is another")
        later.create(an_instance(8))
        assert report(later).found == 0, "nobody else is told of it"
        await until(lambda: heard_later.ready == [7, 8], "taken over too")
        assert {site.pid(name) for name in site.names} == pids, "the same engines"
        assert set(heard_later.urls.values()) == set(heard.urls.values())
        later.remove(an_instance(7))
        await until(lambda: len(site.names) == 1, "it is this gateway's to end")

    told(tmp_path, story, lease_s=0.1)


def test_the_next_gateway_goes_on_with_what_runs_before_the_lease_of_the_last_one_is_over(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        for number in (1, 2):
            fleet.create(an_instance(number))
        await until(lambda: len(heard.ready) == 2, "ready")
        names = set(site.names)
        die(fleet)
        later, heard_later = site.gateway()
        for number, url in ((2, heard.urls[2]), (1, heard.urls[1]), (9, "http://127.0.0.1:9")):
            claim = later.adopt("stub", url)
            assert claim is not None
            assert not claim.found
            claim.begin(an_instance(number))
        assert later.adopt("stub", heard.urls[1]) is None, "it is claimed"
        assert later.adopt("another", heard.urls[1]) is None
        await until(lambda: sorted(heard_later.ready) == [1, 2], "both are found")
        assert heard_later.urls == heard.urls
        assert {placed.holder for placed in site.ray.instances.values()} != {""}, "nobody has freed them"
        await until(lambda: heard_later.leaving == [9], "it is not there, and what runs there is not cut off")
        for placed in site.ray.instances.values():
            placed.holder = ""  # The lease is over.
        await until(lambda: len({placed.holder for placed in site.ray.instances.values()} - {""}) == 1, "it has both")
        for number in (1, 2, 9):
            later.remove(an_instance(number))
        await until(lambda: not site.names, "they are this gateway's to end")
        assert heard_later.failed == []
        assert names

    told(tmp_path, story)


def test_what_runs_is_used_while_the_head_is_away(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        die(fleet)
        site.ray.answers = False
        later, heard_later = site.gateway()
        for number, url in ((1, heard.urls[1]), (9, "http://127.0.0.1:9")):
            claim = later.adopt("stub", url)
            assert claim is not None
            claim.begin(an_instance(number))
        await until(lambda: heard_later.ready == [1], "it answers, though nobody says that it is there")
        site.ray.answers = True
        await until(lambda: heard_later.leaving == [9], "now somebody says that it is not")
        for placed in site.ray.instances.values():
            placed.holder = ""  # The lease is over.
        await until(lambda: set(heard_later.ready) == {1} and report(later).known, "it is known")
        later.remove(an_instance(1))
        await until(lambda: not site.names, "it was this gateway's to end")
        assert heard_later.failed == []

    told(tmp_path, story)


def test_what_ends_while_the_head_is_away_is_noticed(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        die(fleet)
        site.ray.answers = False
        later, heard_later = site.gateway()
        claim = later.adopt("stub", heard.urls[1])
        assert claim is not None
        claim.begin(an_instance(1))
        await until(lambda: heard_later.ready == [1], "it answers, though nobody says that it is there")
        kill(site.pid())
        await until(lambda: heard_later.failed == [1], "it answers no more")
        assert "it stopped answering" in heard_later.reasons[1]

    told(tmp_path, story)


def test_what_another_gateway_keeps_is_given_up_by_the_next_one(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        later, heard_later = site.gateway()
        claim = later.adopt("stub", heard.urls[1])
        assert claim is not None
        claim.begin(an_instance(1))
        await until(lambda: heard_later.failed == [1], "it has another holder for longer than any lease")
        assert "another gateway" in heard_later.reasons[1]
        assert alive(site.pid())

    told(tmp_path, story)


def test_one_that_waits_for_a_node_takes_over_what_becomes_free(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        for number in (1, 2):
            fleet.create(an_instance(number))
        await until(lambda: len(heard.ready) == 2, "ready")
        running = set(site.names)
        later, heard_later = site.gateway()
        for number in (1, 2):
            later.create(an_instance(number))
        await until(lambda: len(site.names) == 4, "it has waited for long enough for what may be another gateway's")
        die(fleet)
        for placed in site.ray.instances.values():
            placed.holder = ""  # The lease is over.
        await until(lambda: len(heard_later.ready) == 2, "taken over")
        assert set(heard_later.urls.values()) == set(heard.urls.values())
        await until(lambda: set(site.names) == running, "nobody waits for a node any more")

    told(tmp_path, story)


def test_what_is_not_ours_is_said_and_not_touched(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(source=replace(SOURCE, env={"STUB": "other"}))
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        await fleet.close()
        other, heard_other = site.gateway(kind="gone/model")
        other.create(an_instance(1, "gone/model"))
        await until(lambda: heard_other.ready == [1], "ready")
        await other.close()
        (settings, model), pids = site.names, {site.pid(name) for name in site.names}
        later, _ = site.gateway()
        later.create(an_instance(1))
        await until(lambda: len(site.names) == 3, "a new one is asked for")
        await until(lambda: len(report(later).notes) == 3, "said")
        notes = "\n".join(report(later).notes)
        assert f"{settings} runs with other settings; it is not touched (chiron ray remove {settings})" in notes
        assert f"{model} runs of 'gone/model', which this config does not have; it is not touched" in notes
        assert "no node has room now" in notes
        await later.close()
        assert [alive(pid) for pid in pids] == [True, True]
        assert site.names == [settings, model], "what had no node yet is given up"

    told(tmp_path, story)


def test_what_its_own_gateway_left_makes_way_for_other_settings(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        needs_all = replace(SOURCE, nodes=2)
        fleet, heard = site.gateway(source=needs_all, owner="gateway")
        fleet.create(an_instance(1))
        fleet.create(an_instance(2))
        await until(lambda: heard.ready == [1] and len(site.names) == 2, "one has all nodes, the other waits")
        await fleet.close()
        adviser, _ = site.gateway(owner="gateway", advise=True)
        stranger, _ = site.gateway(owner="another")
        await until(lambda: report(adviser).notes and report(stranger).notes, "said")
        assert len(site.names) == 1, "neither of them touches it"
        await adviser.close()
        await stranger.close()
        later, heard_later = site.gateway(owner="gateway")
        later.create(an_instance(1))
        await until(lambda: heard_later.ready == [1], "the nodes are its own")
        assert len(site.names) == 1
        elsewhere = site.gateway(owner="gateway", source=replace(SOURCE, namespace="elsewhere"))[0]
        await later.close()
        await until(lambda: not site.names, "nothing is left where the config names no kind any more")
        await until(lambda: len(read_places(site.directory / FILE)) == 1, "nor looked for again")
        await elsewhere.close()
        again, heard_again = site.gateway(owner="gateway")
        again.create(an_instance(1))
        await until(lambda: heard_again.ready == [1], "ready")
        await again.close()
        other, _ = site.gateway(kind="gone/model", owner="gateway")
        await until(lambda: not site.names, "nothing is left of a kind that was removed")
        assert not report(other, "gone/model").notes

    told(tmp_path, story)


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stopped", "killed"])
def test_one_with_other_settings_goes_once_its_requests_have_ended(killed: bool, tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(owner="gateway", source=replace(SOURCE, env={"STUB": "other"}))
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        (name,), pid = site.names, site.pid()
        if killed:
            die(fleet)  # Its lease ends while the next one has what it left.
        else:
            await fleet.close()
        later, heard_later = site.gateway(owner="gateway")
        claim = later.adopt("stub", heard.urls[1])
        assert claim is not None
        claim.begin(an_instance(1))
        await until(lambda: heard_later.leaving == [1], "nothing new begins there")
        later.create(an_instance(2))
        await until(lambda: heard_later.ready == [2], "one with the settings of now is started beside it")
        site.ray.instances[name].holder = ""  # The lease of the last one is over.
        await until(lambda: site.ray.instances[name].holder == later._by_kind["stub"]._holder, "it is held")
        assert alive(pid)
        assert not site.ray.instances[name].stopping
        later.remove(an_instance(1))  # What ran there has ended.
        await until(lambda: name not in site.names, "it makes way")
        assert (heard_later.failed, len(site.names)) == ([], 1)

    told(tmp_path, story)


@pytest.mark.parametrize(
    ("kind", "patience"), [("gone/model", {"grace_s": 600.0}), ("stub", {"settle_s": 600.0})], ids=["kind", "settings"]
)
def test_what_nobody_has_claimed_yet_has_the_time_that_relays_and_requests_have(
    kind: str, patience: dict[str, float], tmp_path: Path
) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(owner="gateway", kind=kind, source=replace(SOURCE, env={"STUB": "other"}))
        fleet.create(an_instance(1, kind))
        await until(lambda: heard.ready == [1], "ready")
        await fleet.close()
        (name,) = site.names
        patient, heard_patient = site.gateway(owner="gateway", **patience)
        patient.create(an_instance(1))
        await until(lambda: heard_patient.ready == [1], "there is room for it")
        assert not site.ray.instances[name].stopping
        await patient.close()
        site.gateway(owner="gateway")
        await until(lambda: name not in site.names, "the time is over")

    told(tmp_path, story)


@pytest.mark.parametrize(
    "same", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["the same cluster", "another cluster"]
)
def test_what_is_left_is_ended_where_the_config_does_not_name_the_cluster_by_any_address(
    same: bool, tmp_path: Path
) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(owner="gateway")
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        await fleet.close()
        (name,) = site.names
        moved = replace(SOURCE, address="10.0.0.5:6379", absent_after_s=1.0 + QUICK.patience_s / 2.0)
        if not same:
            site.elsewhere[moved.address] = MemoryRay({"a": {"GPU": 1.0}}, tmp_path / "elsewhere")
        site.silent.add(moved.address)
        later, heard_later = site.gateway(
            owner="gateway", source=moved, also={"large": replace(moved, resources={"GPU": 2.0})}
        )
        later.create(an_instance(1))
        later.create(an_instance(2, "large"))
        (sweep,) = later._sweeps
        await until(lambda: report(later).instances_max == 0, "nobody answers there for longer than anything settles")
        assert (site.names, sweep.done()) == ([name], False), "it could be the same cluster"
        site.silent.clear()
        await until(lambda: heard_later.ready == [1], "ready")
        await until(sweep.done, "it has been looked through")
        assert (name in site.names) == same
        assert {place.address for place in read_places(site.directory / FILE)} == {moved.address}
        assert (heard_later.failed, report(later, "large").instances_max) == ([], 0)
        assert (heard_later.urls == heard.urls) == same

    told(tmp_path, story)


@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["elsewhere", "nowhere"])
def test_what_one_gateway_left_is_ended_by_another_that_never_had_any_there(named: bool, tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        memory = Shared()
        fleet, heard = site.gateway(
            owner="gateway", source=replace(SOURCE, namespace="former"), memory=memory, directory=tmp_path / "first"
        )
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        await until(lambda: memory.namespaces == {"former"}, "it is known where")
        await fleet.close()
        site.gateway(owner="gateway", memory=memory, directory=tmp_path / "second", none=not named)
        await until(lambda: not site.names, "nothing is left there")
        now = {"chiron"} if named else set()
        await until(lambda: memory.namespaces == now, "nor looked for again")

    told(tmp_path, story)


def test_more_than_may_be_are_ended_and_a_stop_that_removes_leaves_none(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(owner="gateway")
        for number in (1, 2):
            fleet.create(an_instance(number))
        await until(lambda: len(heard.ready) == 2, "ready")
        await fleet.close()
        stranger, _ = site.gateway(owner="another", spare_s=0.3)
        await until(lambda: len(report(stranger).notes) == 2, "said")
        assert "and there are more than may be; it is not touched" in report(stranger).notes[0]
        await stranger.close()
        later, heard_later = site.gateway(owner="gateway", spare_s=0.3)
        later.create(an_instance(1))
        await until(lambda: heard_later.ready == [1] and len(site.names) == 1, "the other has waited for long enough")
        await later.close()
        last, _ = site.gateway(owner="gateway", source=replace(SOURCE, on_stop="remove"))
        await until(lambda: report(last).found == 1, "found")
        await last.close()
        assert not site.names

    told(tmp_path, story)


def test_one_that_leads_no_more_asks_for_no_change_and_ends_nothing_that_was_taken_over(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        (name,) = site.names
        die(fleet)
        site.ray.instances[name].holder = ""
        later, heard_later = site.gateway()
        later.create(an_instance(1))
        await until(lambda: heard_later.ready == [1], "taken over")
        before = site.ray.connect(SOURCE)
        await before.ask(Question(stop={name: 0.0}, holder="the one before"))
        assert not site.ray.instances[name].stopping
        asked: list[Question] = []

        def over() -> None:
            raise OverError

        instances = RayInstances(Asked(asked), "chiron", {"stub": SOURCE}, changes=over, times=QUICK)
        running = asyncio.ensure_future(instances.run())
        await until(lambda: asked, "what is there may be asked")
        instances.hold("stub", asyncio.Event())
        with pytest.raises(OverError):
            await running
        assert not any(each.start or each.stop or each.hold for each in asked)

    told(tmp_path, story)


class OverError(Exception):
    """Stands for the end of the process."""


class Asked:
    """Implements ``RayCluster``: it is empty."""

    def __init__(self, questions: list[Question]) -> None:
        self._questions = questions

    async def ask(self, question: Question) -> Answer:
        self._questions.append(question)
        return Answer()

    async def close(self) -> None: ...


@pytest.mark.slow
def test_two_gateways_in_one_namespace_keep_off_each_others_instances(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        second, heard_second = site.gateway()
        second.create(an_instance(1))
        await until(lambda: heard_second.ready == [1], "it has one of its own, after a while")
        assert heard_second.urls[1] != heard.urls[1]
        await until(lambda: any("another gateway's" in note for note in report(second).notes), "said")
        assert report(second).found == 0
        second.remove(an_instance(1))
        await until(lambda: len(site.names) == 1, "it ends its own")
        assert not heard.failed

    told(tmp_path, story)


def test_a_cluster_that_does_not_answer_stops_nothing_and_is_said(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(source=replace(SOURCE, absent_after_s=0.2))
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        site.ray.answers = False
        await until(lambda: report(fleet).notes, "said")
        assert report(fleet).notes == ("Ray does not answer: the head is away",)
        assert site.notes == ["Ray does not answer: the head is away"], "once"
        fleet.create(an_instance(2))
        await until(lambda: report(fleet).instances_max == 1, "what waits counts as absent")
        fleet.remove(an_instance(1))
        assert alive(site.pid())
        site.ray.answers = True
        await until(lambda: heard.ready == [1, 2], "it comes when Ray does")
        await until(lambda: len(site.names) == 1, "what was to go has gone")
        assert not heard.failed

    told(tmp_path, story)


@pytest.mark.slow
def test_an_engine_that_ends_while_nobody_looks_gives_its_node_back(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        await fleet.close()
        pid = site.pid()
        kill(pid)
        await until(lambda: not alive(pid), "dead")
        site.gateway()
        await until(lambda: not site.names, "it was this config's")

    told(tmp_path, story)


@pytest.mark.slow
def test_nothing_is_left_when_the_gateway_stops_if_so_configured(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway(source=replace(SOURCE, on_stop="remove"))
        for number in (1, 2, 3):
            fleet.create(an_instance(number))
        await until(lambda: len(heard.ready) == 2, "ready, and one waits")
        await fleet.close()
        assert not site.names

    told(tmp_path, story)


def test_what_runs_is_handed_over_however_the_gateway_would_have_stopped(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        source = replace(SOURCE, on_stop="remove")
        fleet, heard = site.gateway(source=source)
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        await fleet.close(hands_over=True)
        later, heard_later = site.gateway(source=source)
        later.create(an_instance(1))
        await until(lambda: heard_later.ready == [1], "taken over")
        assert heard_later.urls == heard.urls

    told(tmp_path, story)


@pytest.mark.slow
def test_advice_starts_and_stops_nothing_and_uses_what_others_have(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        fleet, heard = site.gateway()
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        adviser, heard_too = site.gateway(advise=True)
        await until(lambda: report(adviser).found == 1, "found")
        adviser.create(an_instance(1))
        adviser.create(an_instance(2))
        await until(lambda: heard_too.ready == [1], "used")
        assert heard_too.urls == heard.urls
        adviser.remove(an_instance(1))
        await adviser.close()
        assert len(site.names) == 1
        assert alive(site.pid())
        assert not heard.failed

    told(tmp_path, story)


@pytest.mark.slow
def test_an_instance_over_several_nodes_has_a_leader_and_ends_with_any_of_them(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        words = ("--log-lines", "{rank}", "--environment", str(tmp_path / "{nodes}-{rank}-{leader}"))
        source = replace(SOURCE, nodes=2, command=(*STUB, "--port", "{port}", *words), follower_args=("--port", "0"))
        fleet, heard = site.gateway(source=source)
        fleet.create(an_instance(1))
        await until(lambda: heard.ready == [1], "ready")
        leader, follower = site.ray.engine_pids(site.names[0])
        await until(lambda: len(list(tmp_path.glob("2-?-127.0.0.1"))) == 2, "each knows its rank and the leader")
        assert psutil.Process(follower).cmdline()[-2:] == ["--port", "0"]
        kill(follower)
        await until(lambda: heard.failed == [1], "it is whole or not at all")
        await until(lambda: not alive(leader), "the rest of it ends too")

    told(tmp_path, story)


def test_a_name_that_is_not_ours_is_left_alone_and_a_question_names_who_asks(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        client = site.ray.connect(SOURCE)
        mine = new_name("chiron", "org/model:7b", SOURCE.fingerprint)
        assert mine.startswith("chiron:chiron:org%2Fmodel%3A7b:")
        read = read_name(new_name("chiron", "org/model:7b", SOURCE.fingerprint, "0a1b2c3d"))
        assert read is not None
        assert (read.kind, read.owner) == ("org/model:7b", "0a1b2c3d")
        assert [read_name(f"{mine}{more}") for more in ("\n", ":", "\x1b[1m")] == [None] * 3
        assert (await client.ask(Question(stop={"somebody's": 1.0}, holder="x"))).instances == ()
        site.ray.answers = False
        with pytest.raises(RayError, match="the head is away"):
            await client.ask(Question(holder="x"))

    told(tmp_path, story)
