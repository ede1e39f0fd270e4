"""Prefix cache of an engine model: a program's next prompt costs prefill only for what is new, as far as KV is free."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiron.config.build import setups
from chiron.config.read import ConfigError
from chiron.config.scenario import parse_scenario
from chiron.core.types import ModelSpec
from chiron.engines.model import EngineModel
from chiron.engines.prefix_cache import PROGRAMS_MAX, PrefixCache
from chiron.policies.rivals.scalers.static import StaticSettings
from chiron.policies.rivals.schedulers.autellix import AutellixSettings
from chiron.sim.run import Simulation, simulate
from chiron.sim.setup import Setup
from chiron.workload.types import Programs
from scenario_factory import PROFILE, kind_of, setup_of

ONE, TWO, THREE = ("", "1", 0), ("", "2", 0), ("", "3", 0)


def test_whole_blocks_are_found_and_never_the_last_token() -> None:
    cache = PrefixCache()
    assert cache.found(ONE, 100) == 0
    cache.keep(ONE, 100)
    assert [cache.found(ONE, tokens) for tokens in (200, 100, 96, 97, 10, 1)] == [96, 96, 80, 96, 0, 0]
    assert cache.found(("other key", "1", 0), 200) == 0, "a program is of its key"
    cache.keep(ONE, 50)
    assert cache.found(ONE, 200) == 96, "it grows"
    assert cache.tokens == 100


def test_who_was_heard_of_longest_ago_loses_its_last_blocks_first() -> None:
    cache = PrefixCache()
    for name in (ONE, TWO, THREE):
        cache.keep(name, 160)
    cache.found(ONE, 10)
    cache.fit(400)
    assert [cache.found(name, 1000) for name in (ONE, TWO, THREE)] == [160, 80, 160]
    cache.fit(330)
    # ONE, TWO and THREE were asked for in this order.
    assert [cache.found(name, 1000) for name in (ONE, TWO, THREE)] == [80, 80, 160]
    cache.fit(-5)
    assert cache.tokens == 0
    assert cache.found(THREE, 1000) == 0


def test_no_more_programs_are_remembered_than_there_may_be() -> None:
    cache = PrefixCache()
    for number in range(PROGRAMS_MAX + 1):
        cache.keep(("", str(number), 0), 16)
    assert cache.tokens == 16 * PROGRAMS_MAX
    assert cache.found(("", "0", 0), 100) == 0


SLOW = replace(
    PROFILE,
    h_ms=10.0,
    w0_ms=0.0,
    f_ms_per_token=1.0,
    kv_capacity_tokens=2000,
    max_num_batched_tokens=4096,
    max_num_seqs=8,
)
"""A step takes 10 ms, and a millisecond for each token in it."""
Row = tuple[float, int, int, int, int]


def chain(rows: list[Row], *, of: list[int] | None = None, parents: list[list[int]], **changes: Any) -> Setup:
    base = setup_of(
        rows,
        settings=StaticSettings(max_num_seqs=8),
        profile=SLOW,
        model=ModelSpec(
            name="m0", kinds=(kind_of(SLOW, max_num_batched_tokens=4096),), min_instances=1, max_instances=1
        ),
        **{"prefix_cache": True, **changes},
    )
    ends = np.cumsum([0, *(len(each) for each in parents)])
    of = of or [0] * len(rows)
    programs = Programs(
        kinds=("one",),
        kind=np.zeros(max(of) + 1, dtype=np.int64),
        start_s=np.zeros(max(of) + 1),
        deadline_s=np.full(max(of) + 1, inf),
        of=np.array(of, dtype=np.int64),
        think_s=np.zeros(len(rows)),
        earliest_s=np.array([row[0] for row in rows]),
        parents=np.array([each for some in parents for each in some], dtype=np.int64),
        parents_from=ends,
    )
    return replace(base, workload=replace(base.workload, programs=programs))


def ran(setup: Setup, *, step_mode: bool = False) -> tuple[list[float], Simulation]:
    """TTFT of each call in milliseconds, in order of arrival, and the simulation."""
    simulation = Simulation(setup, step_mode=step_mode)
    simulation.run()
    table = simulation.result(with_bound=False).requests
    return [round(1000.0 * float(each), 3) for each in table.first_token_s - table.arrival_s], simulation


def engine(simulation: Simulation) -> EngineModel:
    (made,) = simulation.engines
    assert isinstance(made, EngineModel)
    return made


THEN: list[Row] = [(0.0, 320, 17, 0, 0), (0.0, 480, 5, 0, 0)]


def test_the_next_prompt_costs_only_what_is_new() -> None:
    first, second = ran(chain(THEN, parents=[[], [0]]))[0]
    # Of 480 tokens 336 were sent or answered before: 21 blocks.
    assert first == 330.0
    assert second == 10.0 + (480 - 336)
    assert ran(chain(THEN, parents=[[], [0]], prefix_cache=False))[0] == [330.0, 490.0]


def test_of_several_answers_at_once_none_is_surely_at_the_beginning() -> None:
    fork: list[Row] = [(0.0, 320, 17, 0, 0), (0.0, 320, 17, 0, 0), (0.0, 480, 5, 0, 0)]
    times, simulation = ran(chain(fork, parents=[[], [], [0, 1]]))
    assert times[2] == 10.0 + (480 - 320)
    assert engine(simulation).prefix_tokens == 304 + 320, "the second one found all but a block of the first one's"


def test_a_conversation_that_is_cut_begins_with_nothing_that_was_there() -> None:
    """Both calls of the second step begin alike, and so does what comes after them, until that is too long again."""
    rows: list[Row] = [(0.0, 320, 17, 0, 0), (0.0, 320, 5, 0, 0), (0.0, 320, 5, 0, 0), (0.0, 320, 5, 0, 0)]
    times, simulation = ran(chain(rows, parents=[[], [0], [0], [1, 2]]))
    assert (times[1], times[3]) == (330.0, 330.0)
    assert engine(simulation).prefix_tokens == 304, "of the second one that begins alike"
    longer: list[Row] = [rows[0], rows[0], (0.0, 400, 5, 0, 0)]
    assert ran(chain(longer, parents=[[], [0], [1]]))[0][2] == 10.0 + 400 - 336, "what was cut goes on"


def test_another_program_shares_nothing() -> None:
    assert ran(chain(THEN, of=[0, 1], parents=[[], []]))[1].engines[0].prefix_tokens == 0  # type: ignore[union-attr]


def test_sequences_take_the_room_of_prefixes() -> None:
    """Of 2,000 tokens of KV, 1,800 go to a request that runs between the two calls."""
    rows: list[Row] = [(0.0, 320, 17, 0, 0), (1.0, 1700, 100, 0, 0), (2.0, 480, 5, 0, 0)]
    setup = chain(rows, of=[0, -1, 0], parents=[[], [], [0]])
    assert setup.workload.programs is not None
    late = replace(setup.workload.programs, think_s=np.array([0.0, 0.0, 20.0]))
    _, simulation = ran(replace(setup, workload=replace(setup.workload, programs=late)))
    # While it ran, 2000 - 1799 were left, in whole blocks.
    assert engine(simulation).prefix_tokens == 192
    cache = engine(simulation)._prefixes
    assert cache is not None
    assert cache.tokens <= 2000


@pytest.mark.parametrize("policy", ["static", "autellix"])
def test_steps_one_by_one_give_the_same(policy: str) -> None:
    text = SCENARIO.replace('duration = "3m"', 'duration = "20s"')
    (made,) = setups(parse_scenario(text, directory=Path()), policies=[policy])
    fast, fast_run = ran(made)
    slow, slow_run = ran(made, step_mode=True)
    assert fast == slow
    hits = [sum(each.prefix_tokens for each in run.engines) for run in (fast_run, slow_run)]  # type: ignore[union-attr]
    assert hits[0] == hits[1] > 0


SCENARIO = """
prefix_cache = true
[classes.agent]
kind = "interactive"
ttft = "5s"
itl = "100ms"
[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
initial = 4
max_instances = 4
[[program]]
model = "m"
class = "agent"
name = "coding"
arrivals = { kind = "poisson", rate = 0.7, duration = "3m" }
steps = { mean = 8, cv = 0.5, max = 20 }
first = 4000
added = { mean = 1500, cv = 0.5 }
output = { mean = 100, cv = 1 }
think = { mean = 1, cv = 1 }
"""


@pytest.mark.slow
def test_locality_of_autellix_saves_most_of_the_prefill() -> None:
    """Where programs stay on their engine, their prefixes are found; spread over four, one time in four or so."""
    (made,) = setups(parse_scenario(SCENARIO, directory=Path()), policies=["autellix"])
    anywhere = replace(made, settings=AutellixSettings(locality_tokens=10**9))
    shares, finish = [], []
    for setup in (made, anywhere):
        simulation = ran(setup)[1]
        engines = [each for each in simulation.engines if isinstance(each, EngineModel)]
        hits = sum(each.prefix_tokens for each in engines)
        shares.append(hits / (hits + sum(each.prefill_tokens for each in engines)))
        result = simulation.result(with_bound=False)
        finish.append(float(np.mean([point.finish_s - point.start_s for point in result.programs])))
    assert shares[0] > 0.8
    assert shares[1] < 0.6
    assert finish[0] < 0.9 * finish[1]


def test_no_bound_is_given_that_prefixes_could_break() -> None:
    summary = simulate(chain(THEN, parents=[[], [0]])).summary
    assert summary["gpu_hours_bound"] == summary["gpu_hours_bound_full"] == 0.0


def test_pipelines_of_stages_have_none() -> None:
    text = SCENARIO.replace("[[program]]", '[models.m.stages]\nprofile = "llama-2-13b/a100"\nsplit = 2\n[[program]]')
    with pytest.raises(ConfigError, match=r"models\.m\.stages: .*not beside prefix_cache = true"):
        parse_scenario(text, directory=Path())
