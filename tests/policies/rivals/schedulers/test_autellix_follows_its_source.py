"""Autellix: service of programs, queues and quanta, starvation, and where calls go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario
from chiron.control.learning import Learner
from chiron.core.types import Instance, Request
from chiron.policies.composers.leveled import LeveledComposer
from chiron.policies.rivals.schedulers.autellix import PROGRAMS_MAX, AutellixSettings, LocalityRouter, ProcessTable
from chiron.sim.run import simulate
from chiron.telemetry.result import Result
from policy_factory import CHAT
from scenario_factory import PROFILE, kind_of


def call(number: int, program: str = "p", arrival_s: float = 0.0, tokens: int = 10) -> Request:
    made = Request(number, "m", CHAT, arrival_s, tokens)
    made.program = program
    return made


def served(table: ProcessTable, request: Request, since_s: float, until_s: float) -> None:
    table.enters(request)
    table.starts(request, since_s)
    table.ended(request, until_s)


@pytest.mark.parametrize(("priority", "service_s"), [("atlas", 5.0), ("plas", 6.0)])
def test_two_calls_at_once_count_as_the_longer_path_or_as_their_sum(priority: Any, service_s: float) -> None:
    """A program that has had 2 s; two parallel calls inherit that and run 3 s and 1 s."""
    table = ProcessTable(AutellixSettings(priority=priority))
    served(table, call(1), 0.0, 2.0)
    one, two = call(2, arrival_s=2.0), call(3, arrival_s=2.0)
    for each, starts_s in ((one, 2.0), (two, 4.5)):
        table.enters(each)
        table.starts(each, starts_s)
    table.ended(one, 5.0)
    table.ended(two, 5.5)
    assert table.program(call(4)).service_s == service_s


@pytest.mark.parametrize(
    ("service_s", "level"), [(0.0, 0), (1.9, 0), (2.0, 1), (4.0, 2), (63.0, 5), (64.0, 6), (1000.0, 6)]
)
def test_a_new_call_begins_in_the_queue_of_what_its_program_has_had(service_s: float, level: int) -> None:
    table = ProcessTable(AutellixSettings(beta=1e9))
    served(table, call(1), 0.0, service_s)
    new = call(2, arrival_s=service_s)
    table.enters(new)
    assert table.level(new, service_s, 0) == level


def test_a_call_sinks_by_a_queue_with_each_quantum_and_waiting_is_no_service() -> None:
    table, request = ProcessTable(AutellixSettings()), call(1)
    table.enters(request)
    table.starts(request, 5.0)
    levels = [table.level(request, 5.0 + ran_s, 0) for ran_s in (1.9, 2.0, 3.9, 4.0, 8.0, 15.9, 16.0)]
    assert levels == [0, 1, 1, 2, 3, 3, 4]
    table.stops(request, 21.0)
    table.starts(request, 30.0)
    assert table.level(request, 45.9, 0) == 4
    assert table.level(request, 46.0, 0) == 5


def test_a_call_that_starved_goes_to_the_first_queue_and_its_own_part_starts_again() -> None:
    """Its program waited 4 s and was served 10 s: at beta 8 it may wait 76 s."""
    table = ProcessTable(AutellixSettings())
    served(table, call(1), 4.0, 14.0)
    new = call(2, arrival_s=14.0)
    table.enters(new)
    assert table.level(new, 89.9, 0) == 3
    assert table.better_s(new) == 90.0
    assert table.level(new, 90.0, 0) == 0
    assert table.better_s(new) == float("inf")
    table.starts(new, 90.0)
    table.stops(new, 92.0)
    assert table.level(new, 92.0, 0) == 1
    assert table.better_s(new) == 92.0 + 8 * (10.0 + 2.0) - 4.0, "what it waited before counts no more"


def test_a_call_whose_engine_failed_waits_in_the_next_one() -> None:
    """It ran for a second; its program was served for 10 s."""
    table = ProcessTable(AutellixSettings())
    served(table, call(1), 0.0, 10.0)
    lost = call(2, arrival_s=10.0)
    composers = [LeveledComposer(table, every_steps=1) for _ in range(2)]
    composers[0].add(lost, 10, False)
    composers[0].remove_head(composers[0].head(10.0, False))  # type: ignore[arg-type]
    assert table.level(lost, 11.0, 0) == 3
    composers[1].add(lost, 10, False)
    assert composers[1].head(15.0, False) is lost
    assert table.level(lost, 98.9, 0) == 3
    assert table.level(lost, 99.0, 0) == 0, "after 8 times 11 s it starves"
    table.ended(lost, 99.0)
    assert table.program(call(3)).ran_s == 11.0


def test_a_call_that_is_called_off_may_wait_until_its_engine_lets_go_of_it() -> None:
    table = ProcessTable(AutellixSettings())
    served(table, call(1), 0.0, 10.0)
    composer = LeveledComposer(table, every_steps=1)
    off, other = call(2, arrival_s=10.0), call(3, arrival_s=11.0)
    for each in (off, other):
        composer.add(each, 10, False)
    assert composer.head(12.0, False) is off
    table.ended(off, 12.0)
    assert composer.head(500.0, False) is other
    composer.forget(off)


def test_a_request_without_a_program_begins_in_the_first_queue() -> None:
    table = ProcessTable(AutellixSettings())
    served(table, call(1, ""), 0.0, 50.0)
    new = call(2, "", 50.0)
    table.enters(new)
    assert table.level(new, 50.0, 0) == 0


def test_programs_of_two_keys_are_not_the_same_by_name() -> None:
    table = ProcessTable(AutellixSettings())
    served(table, call(1), 0.0, 50.0)
    other = call(2, arrival_s=50.0)
    other.tenant = "someone"
    assert table.program(other).service_s == 0.0


def test_a_key_that_names_ever_new_programs_makes_nobody_elses_forgotten() -> None:
    table = ProcessTable(AutellixSettings())
    served(table, call(1), 0.0, 50.0)
    flood = call(2)
    flood.tenant = "someone"
    for number in range(PROGRAMS_MAX + 10):
        flood.program = f"{number}"
        table.program(flood).service_s = 1.0
    assert table.program(call(3)).service_s == 50.0
    assert table.program(flood).service_s == 1.0
    flood.program = "0"
    assert table.program(flood).service_s == 0.0, "forgotten: it was heard of longest ago"


def test_long_prompts_go_to_the_engine_of_their_program_and_short_ones_to_the_emptiest() -> None:
    settings = AutellixSettings()
    router = LocalityRouter(settings, Learner((CHAT,)), ProcessTable(settings))
    kind = kind_of(PROFILE, kv_capacity_tokens=100_000)
    engines = [Instance(number, "m", kind, "mixed", 0.0) for number in (1, 2)]
    for engine in engines:
        router.add(engine)

    def where(request: Request) -> int:
        placement = router.place(request, 0.0)
        assert placement is not None
        return placement.instance.id

    assert where(call(1, tokens=2049)) == 1
    engines[0].requests[1] = call(1)
    router.changed(engines[0])
    assert where(call(2, tokens=2048)) == 2
    assert where(call(3, tokens=2049)) == 1, "it is pinned there"
    assert where(call(4, "q", tokens=2049)) == 2
    router.remove(engines[0])
    assert where(call(5, tokens=2049)) == 2, "its engine is gone"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundaries_s": (2.0, 2.0)}, "boundaries_s are"),
        ({"boundaries_s": (0.0, 2.0), "quanta_s": (1.0, 1.0)}, "boundaries_s are"),
        ({"quanta_s": (1.0,)}, r"quanta_s are .*; there must be 6, as boundaries_s"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_queues_that_contradict_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutellixSettings(**change)


LOADED = """
[classes.agent]
kind = "interactive"
[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1", max_num_seqs = 8 }]
initial = 1
max_instances = 1
[[program]]
name = "long"
model = "m"
class = "agent"
arrivals = { kind = "gamma", rate = 0.2, cv = 0, duration = "60s" }
steps = 12
first = 500
added = 50
output = 300
[[program]]
name = "short"
model = "m"
class = "agent"
arrivals = { kind = "gamma", rate = 0.5, cv = 0, duration = "60s" }
steps = 2
first = 500
added = 50
output = 50
"""


def loaded(policy: str) -> Result:
    (setup,) = setups(parse_scenario(LOADED, directory=Path()), policies=[policy])
    return simulate(setup, with_bound=False)


def test_short_programs_do_not_wait_behind_long_ones() -> None:
    """Eight places are taken by long programs before the first minute is over."""
    plain, ours = loaded("static"), loaded("autellix")
    latency = {r.policy: r.summary["programs"]["short"]["latency_s"]["p90"] for r in (plain, ours)}
    assert latency["autellix"] < 0.5 * latency["static"]
    assert ours.summary["preemptions"] > 10
    assert ours.summary["finished"] == ours.summary["requests"]
