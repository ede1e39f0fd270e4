"""A cascade in a simulation: the small model's call, the large one's after it, one request as its client sees it."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chiron.config.build import history_of, setups, workload_of
from chiron.config.read import ConfigError
from chiron.config.scenario import load_scenario, parse_scenario
from chiron.core.types import Request
from chiron.load.errors import PlanError as LoadPlanError
from chiron.load.plan import make_plan
from chiron.sim.bound import bound, bound_of_run
from chiron.sim.run import Simulation
from chiron.sim.setup import Setup
from chiron.studies.plan import PlanError, cases
from chiron.studies.trial import workload_digest
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import OUTCOMES

SCENARIO = """
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "100ms"
[models.small]
instances = [{ profile = "llama-3.1-8b/h100/tp1" }]
initial = 1
[models.large]
instances = [{ profile = "llama-3.1-70b/h100/tp4" }]
initial = 1
[models.chat]
cascade = { first = "small", then = "large", escalated = 0.4 }
[[workload]]
model = "chat"
class = "chat"
generate = { kind = "poisson", rate = 2, duration = "40s", lengths = { input = { mean = 300, cv = 1 }, output = 40 } }
"""


def setup_with(*overrides: str, policy: str = "static", **changes: Any) -> Setup:
    scenario = parse_scenario(SCENARIO, directory=Path()).with_overrides(*overrides)
    (made,) = setups(scenario, policies=[policy])
    return replace(made, **changes)


def run(setup: Setup, *, step_mode: bool = False) -> tuple[Simulation, Result, str]:
    events = StringIO()
    simulation = Simulation(setup, step_mode=step_mode, events=events)
    simulation.run()
    return simulation, simulation.result(wall_s=0.0), events.getvalue()


def shares(setup: Setup) -> dict[str, int]:
    work = setup.workload
    return {name: int((work.model == i).sum()) for i, name in enumerate(work.models)}


def test_each_request_is_one_answer_that_begins_when_it_is_decided() -> None:
    setup = setup_with()
    plain = workload_of(parse_scenario(SCENARIO.replace('model = "chat"', 'model = "small"'), directory=Path()), 1)
    cascades = setup.workload.cascades
    assert cascades is not None
    second = np.flatnonzero(cascades.waits)
    assert 0 < len(second) < len(plain)
    first = np.array([int(np.flatnonzero(cascades.then == row)[0]) for row in second])
    assert set(setup.workload.output_tokens[first]) == {16}  # What is judged.
    assert (cascades.then[first] > first).all()

    simulation, result, _ = run(setup)
    table = result.requests
    assert np.array_equal(table.arrival_s, plain.arrival_s)  # Of clients, each once, in order.
    assert np.array_equal(table.input_tokens, plain.input_tokens)
    assert np.array_equal(table.output_tokens, plain.output_tokens)
    assert (table.outcome == 0).all()
    raw = simulation.recorder.table()
    assert (raw.dispatch_s[second] >= raw.finish_s[first]).all()
    large = np.array([result.models[i] for i in table.model]) == "large"
    assert np.array_equal(np.sort(table.first_token_s[large]), np.sort(raw.first_token_s[second]))
    alone = np.flatnonzero((cascades.then < 0) & ~cascades.waits)
    steps = (raw.finish_s[alone] - raw.first_token_s[alone]) / 39
    assert np.allclose(table.first_token_s[~large], raw.first_token_s[alone] + 15 * steps)
    assert result.summary["gpu_hours"] >= result.summary["gpu_hours_bound"] > 0


@pytest.mark.parametrize(
    ("after_tokens", "escalated", "itl", "hopeless"),
    [
        (0, 0, "3ms", False),  # It is read only once it is whole: there are no gaps.
        (0, 1, "3ms", False),  # Of a call before another nothing is read.
        (1, 0, "6ms", True),  # It is read as it comes.
        (16, 0, "6ms", False),  # 15 of 39 gaps are over when it is read: 9.75 ms will do.
        (16, 0, "3ms", True),
        (60, 0, "3ms", False),  # It has 40 tokens.
    ],
)
def test_the_bound_asks_no_pace_that_no_client_sees(
    after_tokens: int, escalated: int, itl: str, hopeless: bool
) -> None:
    """A token of the small model takes 6 to 9 ms at least."""
    setup = setup_with(
        f"models.chat.cascade.escalated={escalated}",
        f"models.chat.cascade.after_tokens={after_tokens}",
        f"classes.chat.itl={itl}",
        "duration=3s",
    )
    small, large = bound(setup).models
    assert ("cannot meet their ITL" in " ".join(small.notes)) is hopeless
    assert ("cannot meet their ITL" in " ".join(large.notes)) is bool(escalated), "all gaps of a second call are seen"


def test_the_bound_of_a_run_asks_no_pace_that_no_client_saw() -> None:
    setup = setup_with("models.chat.cascade.escalated=0.3", "classes.chat.itl=6ms", "duration=3s")
    result = run(setup)[1]
    assert result.requests.attained(result.classes).any()
    assert "cannot meet their ITL" not in " ".join(bound_of_run(setup, result.requests, 60.0).models[0].notes)


@pytest.mark.slow
def test_fast_forward_is_step_mode() -> None:
    setup = setup_with("duration=3s")
    assert run(setup)[2] == run(setup, step_mode=True)[2]


def test_a_larger_share_holds_those_of_a_smaller_one() -> None:
    passed = []
    for share in ("0", "0.2", "{ half_tokens = 400, power = 2 }", "1"):
        cascades = setup_with(f"models.chat.cascade.escalated={share}").workload.cascades
        assert cascades is not None
        passed.append(set(cascades.start_s[cascades.then >= 0].tolist()))
    assert passed[0] == set()
    assert passed[1] < passed[3]
    by_length = setup_with("models.chat.cascade.escalated={ half_tokens = 400, power = 100 }").workload
    assert by_length.cascades is not None
    escalated = by_length.cascades.then >= 0
    own = ~by_length.cascades.waits
    assert by_length.input_tokens[escalated].min() > 350
    assert by_length.input_tokens[own & ~escalated].max() < 450


def test_the_second_call_has_what_is_left_of_the_ttft() -> None:
    setup = setup_with("models.chat.cascade.escalated=1", "models.chat.cascade.after_tokens=0")
    simulation = Simulation(setup)
    seen: list[Request] = []
    submit = simulation.plane.submit
    assert simulation.cascades is not None
    simulation.cascades._submit = lambda request: (seen.append(request), submit(request))[1]
    simulation.run()
    cascades = setup.workload.cascades
    assert cascades is not None
    assert len(seen) == int(cascades.waits.sum())
    for request in seen:
        left_s = 5.0 - (request.arrival_s - cascades.start_s[request.id])
        assert request.ttft_slo_s == pytest.approx(left_s)


def test_a_first_call_that_fails_is_answered_by_the_second_model() -> None:
    """Long prompts do not fit the small model's KV."""
    setup = setup_with(
        "models.chat.cascade.escalated=1", "models.small.instances.0.kv_capacity_tokens=400", "duration=10s"
    )
    simulation, result, _ = run(setup)
    refused = int((simulation.recorder.table().outcome == OUTCOMES.index("rejected")).sum())
    assert 0 < refused < len(result.requests.arrival_s) == shares(setup)["small"]
    assert {result.models[i] for i in result.requests.model} == {"large"}
    assert (result.requests.outcome == 0).all()


@pytest.mark.parametrize("escalated", [0, 0.4, 1])
def test_a_first_call_waits_for_an_instance_as_long_as_a_gateway_lets_it(escalated: float) -> None:
    """The small model takes one request at a time, of a second or so, and two come each second."""
    setup = setup_with(
        f"models.chat.cascade.escalated={escalated}",
        "models.chat.cascade.first_wait=1.5s",
        "models.small.instances.0.max_num_seqs=1",
        "models.small.max_instances=1",
        "workload.0.generate.lengths={ input = 100, output = 200 }",
        "models.chat.cascade.after_tokens=0",
        "duration=20s",
        policy="chiron",
    )
    simulation, result, events = run(setup)
    table, raw = result.requests, simulation.recorder.table()
    assert (table.outcome == 0).all()
    by_large = np.array([result.models[i] == "large" for i in table.model])
    assert by_large.sum() > 5
    assert by_large.all() == (escalated == 1)
    waited_s = np.where(raw.dispatch_s >= 0, raw.dispatch_s - setup.workload.arrival_s, 0.0)
    cascades = setup.workload.cascades
    assert cascades is not None
    first = ~cascades.waits & ~np.isin(np.arange(len(raw.model)), list(simulation.cascades._asked_again))  # type: ignore[union-attr]
    assert waited_s[first].max() <= 1.5
    assert '"outcome":"cancelled"' in events
    seen_s = (table.first_token_s - table.arrival_s)[by_large]
    assert (seen_s > 0).all()
    if escalated == 0:
        assert (seen_s >= 1.5).all(), "they waited for the small model first"
        assert seen_s.max() < 1.5 + 1.0


def test_without_an_instance_in_time_the_second_model_answers_within_the_ttft() -> None:
    cold = "models.small.initial=0"
    setup = setup_with("models.chat.cascade.escalated=0.4", cold, "models.small.min_instances=0", "duration=10s")
    result = run(setup)[1]
    assert {result.models[i] for i in result.requests.model} == {"large"}
    assert result.requests.attained(result.classes).all()
    for_ever = replace(setup, workload=setup_with("duration=10s", "models.chat.cascade.first_wait=1h").workload)
    assert not run(for_ever)[1].requests.attained(for_ever.workload.classes).all()


def test_the_past_passes_other_requests_on() -> None:
    """Or what a policy has lived through would be passed on just as what it is judged by."""
    past = SCENARIO[SCENARIO.index("[[workload]]") :].replace("workload", "history")
    scenario = parse_scenario(SCENARIO + past, directory=Path())
    passed = []
    for workload in (workload_of(scenario, 1), history_of(scenario, 1)):
        assert workload is not None
        assert workload.cascades is not None
        first = ~workload.cascades.waits
        passed.append((workload.cascades.then[first] >= 0)[:40].tolist())
    assert passed[0] != passed[1]


def test_a_cut_takes_requests_whole() -> None:
    workload = setup_with('duration="10s"').workload
    assert workload.cascades is not None
    assert workload.cascades.start_s.max() < 10.0
    assert int(workload.cascades.waits.sum()) == int((workload.cascades.then >= 0).sum()) > 0


def test_the_digest_of_a_workload_sees_every_request() -> None:
    """The text of a long array leaves out its middle."""
    workload = setup_with("workload.0.generate.rate=40", "models.chat.cascade.escalated=0").workload
    assert workload.cascades is not None
    assert len(workload) > 1200
    shown = workload.cascades.shown_tokens.copy()
    shown[len(shown) // 2] += 1
    other = replace(workload, cascades=replace(workload.cascades, shown_tokens=shown))
    assert workload_digest(workload) == workload_digest(replace(workload))
    assert workload_digest(workload) != workload_digest(other)


def test_what_cannot_be_is_refused() -> None:
    for old, new, words in (
        ('then = "large"', 'then = "larg"', "models.chat.cascade.then: unknown name 'larg'"),
        ("escalated = 0.4", "escalated = 1.4", "escalated is 1.4; it must be 0 to 1"),
        ("escalated = 0.4", "escalated = { half_tokens = 0 }", "half_tokens"),
        ("cascade = {", "min_instances = 0\ncascade = {", "a cascade has no min_instances of its own"),
        ('kind = "interactive"', 'kind = "batch"\ndeadline = "1h"', "asked by interactive requests of streams only"),
    ):
        with pytest.raises(ConfigError) as error:
            setups(parse_scenario(SCENARIO.replace(old, new, 1), directory=Path()), policies=["static"])
        assert words in str(error.value), str(error.value)
    with pytest.raises(LoadPlanError, match="a cascade"):
        make_plan(setup_with().workload, name="x", seed=1)
    past = SCENARIO[SCENARIO.index("[[workload]]") :].replace("workload", "history")
    for text in (SCENARIO, SCENARIO.replace('model = "chat"', 'model = "small"') + past):
        with pytest.raises(PlanError, match="each model is planned alone"):
            cases(parse_scenario(text, directory=Path()), "static", [1])


def test_the_packaged_one_loads_and_names_its_models() -> None:
    scenario = load_scenario("cascade", ["duration=1m", "workload.0.duration=1m"])
    (made,) = setups(scenario, policies=["chiron"])
    assert [spec.name for spec in made.models] == ["small", "large"]
    (only,) = setups(scenario.with_overrides("workload.0.model=large"), policies=["chiron"])
    assert shares(only) == {"large": shares(made)["small"]}
