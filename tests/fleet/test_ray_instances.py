"""Instances on a Ray cluster: placed, lost, and left alone while the cluster does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from chiron.fleet.ray.cluster import Question, RayError, new_name, read_name
from fleet_factory import STUB, alive, an_instance, kill, until
from ray_memory_site import SOURCE, Site, die, report, told


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
