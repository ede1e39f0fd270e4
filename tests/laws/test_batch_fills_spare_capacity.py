"""Law: capacity that interactive requests leave idle is used by batch work that is due, however tight their SLOs, and
they keep theirs; what is already lost takes nothing from what is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario
from chiron.sim.run import simulate
from chiron.telemetry.result import Result

H100 = "llama-3.1-8b/h100/tp1"
A100 = "llama-3.1-8b/a100/tp1"
CONVERSATIONS = '"azure-2023-conv"'
CHAT = """
[classes.{name}]
kind = "interactive"
ttft = "{ttft}s"
itl = "{itl}ms"
[[workload]]
model = "m"
class = "{name}"
generate = {{ kind = "gamma", rate = {rate}, cv = 1.5, duration = "{duration}s", lengths = {lengths} }}
"""
JOB = """
[classes.job{number}]
kind = "batch"
[[batch_job]]
model = "m"
class = "job{number}"
at = "{at}s"
deadline = "{due}s"
requests = {requests}
lengths = {lengths}
"""


def run(
    interactive: list[tuple[str, float, float, float, str]],
    jobs: list[tuple[float, float, int, str]],
    *,
    profile: str = H100,
    instances: int = 3,
    most: int | None = None,
    duration_s: float = 240.0,
    seed: int = 3,
    overrides: Sequence[str] = (),
) -> Result:
    """Interactive: (class, TTFT s, ITL ms, requests/s, lengths); jobs: (at s, due after s, items, lengths)."""
    parts = [
        f'seeds = [{seed}]\ngrace = "30m"\n[models.m]\ninstances = [{{ profile = "{profile}" }}]\n'
        f"max_instances = {most or instances}\ninitial = {instances}\n"
    ]
    for name, ttft, itl, rate, lengths in interactive:
        parts.append(CHAT.format(name=name, ttft=ttft, itl=itl, rate=rate, duration=duration_s, lengths=lengths))
    for number, (at, due, requests, lengths) in enumerate(jobs, 1):
        parts.append(JOB.format(number=number, at=at, due=due, requests=requests, lengths=lengths))
    scenario = parse_scenario("".join(parts), directory=Path(), name="spare").with_overrides(*overrides)
    (setup,) = setups(scenario, policies=["chiron"])
    return simulate(setup, with_bound=False)


TWO = [
    ("chat", 1.5, 50, 19.0, CONVERSATIONS),
    ("agent", 10.0, 150, 12.0, '"azure-2023-code"'),
]
CASES = [
    # About half of the fleet is idle; the job needs most of that until it is due.
    pytest.param(TWO, [(20, 220, 1500, '"sharegpt-300"')], {}, id="two tight classes on three H100"),
    pytest.param(
        [("chat", 2.0, 30, 5.0, CONVERSATIONS)],
        [(20, 220, 900, '"sharegpt-300"')],
        {"profile": A100, "instances": 3},
        id="ITL 30 ms on three A100",
    ),
    pytest.param(
        [("chat", 1.5, 50, 7.0, CONVERSATIONS)],
        [(20, 220, 600, '"arxiv-summarization"')],
        {"instances": 1},
        id="long batch prompts on one H100",
    ),
    pytest.param(
        [("agent", 10.0, 100, 0.5, '"mooncake-conversation"')],
        [(20, 220, 300, '"arxiv-summarization"')],
        {"profile": "llama-3.1-70b/h100/tp4", "instances": 2, "seed": 5},
        id="long prompts of both kinds on a 70B",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("interactive", "jobs", "how"), CASES)
def test_idle_capacity_beside_tight_slos_is_used_by_batch_work_that_is_due(
    interactive: list[tuple[str, float, float, float, str]],
    jobs: list[tuple[float, float, int, str]],
    how: dict[str, object],
) -> None:
    attained = run(interactive, jobs, **how).summary["attainment"]  # type: ignore[arg-type]
    assert attained["job1"] >= 0.99, attained
    assert all(attained[name] >= 0.98 for name, *_ in interactive), attained


@pytest.mark.slow
def test_a_job_that_cannot_be_met_takes_nothing_from_one_that_can() -> None:
    """The first job is due after two minutes and has work for five; the second would fit alone."""
    jobs = [(10, 100, 8000, '"sharegpt-300"'), (10, 230, 700, '"sharegpt-300"')]
    result = run(TWO, jobs)
    attained = result.summary["attainment"]
    assert attained["job2"] >= 0.99, attained
    assert attained["job1"] * 3500 >= 500, "what can be done in time is done"
    assert min(attained["chat"], attained["agent"]) >= 0.98


@pytest.mark.slow
def test_no_instance_is_added_for_batch_work_that_fits_beside_tight_slos() -> None:
    result = run(TWO, [(20, 260, 2500, '"sharegpt-300"')], most=12, duration_s=280.0)
    attained = result.summary["attainment"]
    assert min(attained.values()) >= 0.98, attained
    assert result.summary["instances_peak"] <= 4


@pytest.mark.slow
def test_requests_that_are_lost_do_not_keep_a_job_from_its_deadline() -> None:
    """For a minute comes much more than one instance carries; then hundreds wait that have missed their TTFT, and the
    job is due before all of them could be served."""
    crowd = [("chat", 1.5, 50, 23.0, CONVERSATIONS), ("agent", 10.0, 150, 14.0, '"azure-2023-code"')]
    job = [(5, 100, 300, '"sharegpt-300"')]
    result, unprotected = (
        run(crowd, job, instances=1, duration_s=60.0, overrides=[f"policies.chiron.risk_share={share}"])
        for share in (0.1, 1e9)
    )
    attained, before = result.summary["attainment"], unprotected.summary["attainment"]
    assert min(before["chat"], before["agent"]) < 0.9, "an overload"
    assert before["job1"] < 0.1
    assert attained["job1"] > 0.8
    assert all(attained[name] > before[name] - 0.005 for name in ("chat", "agent")), "who was not lost pays nothing"
    items = result.requests.evictions[result.requests.cls == 2]
    assert items.sum() < 0.3 * len(items), "it stays where it runs"
