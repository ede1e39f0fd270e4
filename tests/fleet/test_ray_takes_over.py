"""Instances on Ray outlive their gateway: taken over, given up or ended, and left alone if they are of others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from chiron.fleet.ray.cluster import Answer, Question
from chiron.fleet.ray.instances import RayInstances
from chiron.fleet.ray.places import FILE, read_places
from chiron.fleet.ray.testing import MemoryRay
from fleet_factory import alive, an_instance, until
from ray_memory_site import QUICK, SOURCE, Shared, Site, die, report, told


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
