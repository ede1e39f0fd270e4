"""Law: under any constant overload a fleet that cannot grow serves in time what it serves in time at its limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario
from chiron.sim.run import simulate
from chiron.telemetry.result import Result

SCENARIO = """
seeds = [{seed}]
grace = "1m"
{classes}
[models.m]
instances = [{{ profile = "{profile}" }}]
max_instances = {instances}
initial = {instances}
{workload}
"""
CLASS = """
[classes.{name}]
kind = "interactive"
ttft = "{ttft}s"
itl = "{itl}s"
"""
STREAM = """
[[workload]]
model = "m"
class = "{name}"
generate = {{ kind = "{kind}", rate = {rate}, duration = "{duration}s", lengths = {lengths}{more} }}
"""


def run(
    *streams: tuple[str, float, float, float],
    duration_s: float = 240.0,
    lengths: str = '"sharegpt-300"',
    profile: str = "llama-3.1-8b/a100/tp1",
    instances: int = 1,
    kind: str = "poisson",
    more: str = "",
    refuse: bool = False,
    seed: int = 1,
) -> Result:
    """Streams are (class, TTFT s, ITL s, requests/s)."""
    text = SCENARIO.format(
        seed=seed,
        profile=profile,
        instances=instances,
        classes="".join(CLASS.format(name=name, ttft=ttft, itl=itl) for name, ttft, itl, _ in streams),
        workload="".join(
            STREAM.format(name=name, rate=rate, duration=duration_s, lengths=lengths, kind=kind, more=more)
            for name, _, _, rate in streams
        ),
    )
    scenario = parse_scenario(text, directory=Path(), name="overload")
    if refuse:
        scenario = scenario.with_overrides("policies.chiron.overload.refuse=true")
    (setup,) = setups(scenario, policies=["chiron"])
    return simulate(setup, with_bound=False)


def goodput(result: Result, after_s: float = 60.0, until_s: float = 240.0) -> float:
    """Requests per second that came in this time and were served within their SLO."""
    table = result.requests
    counted = (table.arrival_s >= after_s) & (table.arrival_s < until_s)
    return float((table.attained(result.classes) & counted).sum()) / (until_s - after_s)


CASES = [
    # (what, knee in requests/s for one instance, arguments)
    pytest.param(6.0, {"lengths": '"sharegpt-300"'}, (5.0, 0.2), id="chat on an A100", marks=pytest.mark.slow),
    pytest.param(6.0, {"lengths": '"sharegpt-300"'}, (1.0, 0.1), id="tight TTFT", marks=pytest.mark.slow),
    pytest.param(
        2.2,
        {"lengths": "{ input = { p50 = 3000, p99 = 9000 }, output = 60 }"},
        (5.0, 0.2),
        id="long prompts",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        12.0,
        {"lengths": '"sharegpt-300"', "profile": "llama-3.1-8b/h100/tp1", "kind": "gamma", "more": ", cv = 3"},
        (5.0, 0.1),
        id="bursts on an H100",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("refuse", [False, True])
def test_goodput_far_beyond_the_knee_is_that_at_the_knee(refuse: bool) -> None:
    at_the_knee, beyond = (goodput(run(("chat", 5.0, 0.2, rate), refuse=refuse)) for rate in (6.0, 15.0))
    assert beyond >= 0.9 * at_the_knee > 4.0


@pytest.mark.parametrize(("knee", "how", "slo"), CASES)
@pytest.mark.parametrize("refuse", [False, True])
def test_goodput_does_not_fall_with_the_load(
    knee: float, how: dict[str, str], slo: tuple[float, float], refuse: bool
) -> None:
    reached = {x: goodput(run(("chat", *slo, x * knee), refuse=refuse, **how)) for x in (0.8, 1.0, 1.5, 2.5, 4.0)}  # type: ignore[arg-type]
    at_the_knee = max(reached[0.8], reached[1.0])
    assert all(reached[x] >= 0.9 * at_the_knee for x in (1.5, 2.5, 4.0)), reached


@pytest.mark.slow
def test_a_class_within_its_share_does_not_notice_the_overload_of_another() -> None:
    """6 requests/s of a tight class would fit alone on four A100; 40 requests/s of another do not fit at all."""
    result = run(("tight", 1.0, 0.06, 6.0), ("chat", 5.0, 0.2, 40.0), instances=4)
    attained = result.summary["attainment"]
    assert attained["tight"] >= 0.97
    assert goodput(result) >= 18.0


def test_refusal_turns_away_what_would_be_late_and_nobody_waits_long() -> None:
    result = run(("chat", 5.0, 0.2, 15.0), refuse=True)
    assert result.summary["shed"] > 1000
    assert result.summary["shed"] + result.summary["finished"] >= 0.9 * len(result.requests.arrival_s)


KEYS = """
grace = "1m"
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"
[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 1
[[workload]]
model = "m"
class = "chat"
key = "greedy"
generate = { kind = "poisson", rate = 20, duration = "4m", lengths = "sharegpt-300" }
[[workload]]
model = "m"
class = "chat"
key = "modest"
generate = { kind = "poisson", rate = 2, duration = "4m", lengths = "sharegpt-300" }
"""


def test_a_key_within_its_share_does_not_notice_the_overload_of_another() -> None:
    scenario = parse_scenario(KEYS, directory=Path(), name="keys")
    (setup,) = setups(scenario, policies=["chiron"])
    result = simulate(setup, with_bound=False)
    assert setup.workload.tenant is not None
    modest = setup.workload.tenant == setup.workload.tenants.index("modest")
    modest &= result.requests.arrival_s > 90.0  # At first the fleet is empty, and nothing ends for a minute.
    assert result.requests.attained(result.classes)[modest].mean() > 0.97


SHARED = """
grace = "1m"
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"
[models.flooded]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 4
initial = 3
[models.modest]
instances = [{ profile = "llama-3.1-8b/a100/tp1", name = "other" }]
max_instances = 4
initial = 1
[gpus]
a100 = 4
[[workload]]
model = "flooded"
class = "chat"
generate = { kind = "poisson", rate = 40, duration = "6m", lengths = "sharegpt-300" }
[[workload]]
model = "modest"
class = "chat"
generate = { kind = "poisson", rate = 8, duration = "6m", lengths = "sharegpt-300" }
"""


@pytest.mark.slow
def test_a_model_within_its_share_of_the_gpus_gets_it_from_one_that_is_flooded() -> None:
    """8 requests/s need two A100; they are there once the other has drained one."""
    scenario = parse_scenario(SHARED, directory=Path(), name="shared")
    (setup,) = setups(scenario, policies=["chiron"])
    result = simulate(setup, with_bound=False)
    table = result.requests
    later = (table.model == result.models.index("modest")) & (table.arrival_s > 120.0)
    assert table.attained(result.classes)[later].mean() > 0.95
    assert result.summary["reversals"] == 0
