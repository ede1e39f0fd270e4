"""Law 10 for a run that was: told again what a gateway's control plane was told, another one does the same.

The run is on the gateway's real path in memory, with instances that die and engines that lose requests; its log is a
file, as a gateway writes it. Then faults are put in: into the log, and into the policy that replays it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from chiron.control.learned import Learned
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import ModelSpec, Request
from chiron.engines.remote import CUT, Wire
from chiron.fleet.model import Failures
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.policies.policy import Policy
from chiron.policies.registry import POLICIES, make_policy
from chiron.policies.stages.registry import with_stages
from chiron.runtime.input_log import Point, described
from chiron.runtime.replay import Replayed, ReplayError, replay
from chiron.sim.setup import Setup
from chiron.telemetry.event_log import read_event_log
from pipelines import pipeline_kind, stage_kind
from real_path import run_real
from recorded_plane import Recorded
from scenario_factory import CLASSES, PROFILE, kind_of, setup_of
from virtual_loop import run_virtual

SMALL = replace(
    PROFILE,
    h_ms=12.0,
    w0_ms=2.0,
    f_ms_per_token=0.6,
    c_ms_per_context_token=0.02,
    kv_capacity_tokens=1500,
    max_num_seqs=24,
    max_num_batched_tokens=128,
)
Line = dict[str, Any]


def scenario(policy: str) -> Setup:
    draw, at_s, rows = Random(5), 0.0, []
    while at_s < 25.0:
        at_s += draw.expovariate(16.0 if 8.0 < at_s < 16.0 else 3.0)
        rows.append((at_s, draw.randint(20, 120), draw.randint(2, 25), 0, draw.choice((0, 0, 1))))
    rows += [(4.0, draw.randint(20, 100), draw.randint(10, 40), 0, 2) for _ in range(40)]
    rows += [(6.0, 900, 700, 0, 0)]
    spec = ModelSpec(
        name="m0", kinds=(kind_of(SMALL, max_num_batched_tokens=SMALL.max_num_batched_tokens),), max_instances=4
    )
    tries = ((CUT,), (CUT, CUT), (503,), (500, CUT), (429, 429, CUT), (CUT,) * 5, (500, 500))
    return setup_of(
        rows,
        policy=policy,
        settings=POLICIES[policy].settings(),
        profile=SMALL,
        model=spec,
        failures=Failures(at=(10.3, 16.4), start_failure=0.3),
        scrape_delay_s=0.0,
        wire=Wire(
            network_s=1 / 1024,
            notice_s=0.05,
            faults={row: tries[row % len(tries)] for row in range(3, len(rows), 5)},
            pieces=frozenset(range(1, len(rows), 3)),
        ),
    )


def recorded(path: Path, policy: str, relays: int = 0) -> tuple[list[Line], Learned]:
    """The lines of a run's log, which was a file, and what its control plane had learned in the end."""
    setup = scenario(policy)
    facts = described(make_policy(policy, setup.settings), setup.models, setup.workload.classes, setup.gpus_max)
    writer = EventWriter(EventLogSettings(path=path), wall_origin_s=0.0, facts=facts)
    real = run_virtual(run_real(setup, relays=relays, record=writer.write))
    writer.close()
    assert real.faults > 5
    return list(read_event_log(path)), real.plane.learned(0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Line], Learned]:
    return recorded(tmp_path_factory.mktemp("log") / "inputs.jsonl", "chiron")


@pytest.fixture(scope="module")
def log(run: tuple[list[Line], Learned]) -> list[Line]:
    return run[0]


def of_requests(learned: Learned) -> dict[str, Any]:
    """Without the load, which goes on after the last line of a log."""
    return {name: {**model, "fleet": None} for name, model in learned.models.items()}


def test_every_decision_and_placement_is_made_again(run: tuple[list[Line], Learned]) -> None:
    log, learned = run
    done = replay(log)

    assert done.difference == ""
    assert of_requests(done.learned) == of_requests(learned)
    counts = {kind: sum(line["event"] == kind for line in log) for kind in ("in", "decision")}
    assert (done.inputs, done.decisions) == (counts["in"], counts["decision"])
    assert done.decisions > 5
    assert done.placements > 200
    kinds = {line["k"] for line in log if line["event"] == "in"}
    assert {"start", "begin", "submit", "first_token", "finished", "evicted", "lost", "refused", "sampled"} <= kinds
    assert {"avoid", "instance_ready_from", "instance_failed"} <= kinds


@pytest.mark.parametrize(
    ("policy", "relays"),
    [
        pytest.param("chiron", 2, id="two relays"),
        pytest.param("chiron", 5, id="five relays", marks=pytest.mark.slow),
        pytest.param("llumnix-tuned", 0, id="llumnix", marks=pytest.mark.slow),
        pytest.param("hpa-queue-tuned", 0, id="hpa", marks=pytest.mark.slow),
    ],
)
def test_so_it_is_with_relays_and_under_rivals(policy: str, relays: int, tmp_path: Path) -> None:
    log, learned = recorded(tmp_path / "inputs.jsonl", policy, relays)
    done = replay(log)

    assert done.difference == ""
    assert of_requests(done.learned) == of_requests(learned)
    assert done.placements > 200


def changed(log: list[Line], choose: Callable[[Line], bool], change: Callable[[list[Line], int], None]) -> list[Line]:
    """With a change in the middle one of those chosen."""
    lines = json.loads(json.dumps(log))
    found = [i for i, line in enumerate(lines) if choose(line)]
    change(lines, found[len(found) // 2])
    return lines


def of(event: str, kind: str = "") -> Callable[[Line], bool]:
    return lambda line: line["event"] == event and kind in ("", line.get("k"))


def drop(lines: list[Line], at: int) -> None:
    del lines[at]


def one_more_bit(lines: list[Line], at: int) -> None:
    """Of the first number that is a fraction."""
    numbers = lines[at]["numbers"]
    name = next(name for name, value in numbers.items() if isinstance(value, float) and value % 1.0)
    numbers[name] *= 1.0 + 2.0**-52


def other_instance(lines: list[Line], at: int) -> None:
    lines[at]["a"][1] += 1


def later(lines: list[Line], at: int) -> None:
    lines[at], lines[at + 1] = lines[at + 1], lines[at]


FAULTS = [
    ("a finished answer that the log lacks", of("in", "finished"), drop),
    ("a decision with another last bit", of("decision"), one_more_bit),
    ("a placement elsewhere", of("out", "dispatch"), other_instance),
    ("a placement too few", of("out", "dispatch"), drop),
    ("an arrival after what became of it", of("in", "submit"), later),
]


@pytest.mark.parametrize(("choose", "change"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS])
def test_a_difference_is_found(
    choose: Callable[[Line], bool], change: Callable[[list[Line], int], None], log: list[Line]
) -> None:
    done = replay(changed(log, choose, change))

    assert done.difference
    assert 0 < done.inputs < sum(line["event"] == "in" for line in log)


def test_a_policy_that_decides_otherwise_is_found(log: list[Line]) -> None:
    def make(name: str, settings: Any) -> Policy:
        return make_policy(name, replace(settings, itl_margin=settings.itl_margin * (1.0 + 1e-12)))

    assert "the log has" in replay(log, make).difference


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda log: log[1:], "no input log"),
        (lambda log: [log[0], *log[5:]], "beginning"),
        (
            lambda log: [*log[:50], {"t": 1.0, "event": "dropped", "lines": 3}, *log[50:]],
            "3 lines of the log were lost",
        ),
        (
            lambda log: [{**log[0], "replay": log[0]["replay"].replace('"chiron"', '"chirno"', 1)}],
            "'chirno' is unknown",
        ),
        (lambda log: [{**log[0], "replay": log[0]["replay"].replace('"version": 3', '"version": 9')}], "version 9"),
    ],
    ids=["no head", "rotated", "lines lost", "another policy", "another version"],
)
def test_what_cannot_be_replayed_is_said(
    spoil: Callable[[list[Line]], list[Line]], message: str, log: list[Line]
) -> None:
    with pytest.raises(ReplayError, match=message):
        replay(spoil(log))


def test_a_log_that_is_still_being_written_replays_as_far_as_it_goes(log: list[Line]) -> None:
    done: Replayed = replay(log[: len(log) // 2])

    assert done.difference == ""
    assert done.placements > 100


class Staged(Recorded):
    """A pipeline of two stages, whose second one is asked for more than it can do."""

    def __init__(self, stage_policy: str) -> None:
        stages = (stage_kind(0, max_replicas=4), stage_kind(1, max_replicas=4))
        kind = replace(kind_of(SMALL), gpus=2, pipeline=pipeline_kind(*stages))
        policy = with_stages(make_policy("chiron", None), stage_policy)
        super().__init__(instances=1, spec=ModelSpec(name="m0", kinds=(kind,), max_instances=1), policy=policy)
        instance = self.plane.instances[1]
        for second in range(1, 120):
            request = Request(second, "m0", CLASSES[0], self.clock.now_s, 30)
            self.inputs.submit(request)
            busy_s = [0.1 * second, 0.95 * second]
            told = tuple(
                StageSample(ready=1, starting=0, draining=0, busy_s=busy, passes=9.0 * second, tokens=20.0 * second)
                for busy in busy_s
            )
            now_s = self.clock.now_s
            sample = PipelineSample(taken_s=now_s, stages=told, running=4, waiting=second, context_tokens=400.0)
            self.inputs.stages_sampled(instance, sample)
            self.clock.run_until(now_s + 1.0)


@pytest.mark.parametrize("policy", ["stage-hpa", "stage-balance"])
def test_so_it_is_with_stages_of_pipelines(policy: str) -> None:
    run = Staged(policy)
    decided = [line for line in run.lines if line["event"] == "decision" and line["kind"] == "stage"]
    assert decided
    assert run.replayed().difference == ""
    # Neither what they told nor who decided is left out unnoticed.
    told = [line for line in run.lines if line.get("k") != "stages_sampled"]
    head = run.lines[0]["replay"]
    other = {"stage-hpa": "stage-balance", "stage-balance": "stage-hpa"}[policy]
    setup = json.loads(head)
    setup["stages"] = described(with_stages(make_policy("chiron", None), other), [], [], None)["replay"]
    setup["stages"] = json.loads(setup["stages"])["stages"]
    for lines in (told, [{**run.lines[0], "replay": json.dumps(setup)}, *run.lines[1:]]):
        assert replay(json.loads(json.dumps(line)) for line in lines).difference


def test_timers_of_a_compiled_control_plane_count_as_well() -> None:
    """Its methods are built in, and name no module themselves."""
    point = Point()
    for module in ("chiron.control.scrapes", "chiron.fleet.model"):
        owner = type("Owner", (list,), {"__module__": module})()
        assert owner.clear.__module__ is None
        point.marked(owner.clear)()
    assert point.fired == 1
