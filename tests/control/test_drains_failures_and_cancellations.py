"""The control plane through the days that go wrong, in virtual time, on model engines with steps of 1/64 s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from chiron.control.dispatcher import AVOID_ALONE_S, RETRIES_MAX
from chiron.control.eviction import REDONE_MAX
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, ModelSpec, Request, Role
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.fleet.model import ColdStart, Failures, FleetModel
from chiron.policies.chiron.global_loop import make_chiron
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.policy import Policy
from chiron.policies.size import prefill_s
from chiron.policies.views import FleetPlan, FleetView, ModelPlan
from scenario_factory import CLASSES, PROFILE, TICK_S, kind_of

CHAT, AGENT, NIGHT, SOMEDAY = CLASSES
ROOMY = replace(PROFILE, kv_capacity_tokens=100_000, max_num_seqs=4, kv_bytes_per_token=1)
LOAD_S = 3.0


class Stage:
    """A control plane whose fleet plan the test dictates, with model engines under a virtual clock."""

    def __init__(
        self,
        *,
        profile: Profile = ROOMY,
        ready: int = 1,
        least: int = 0,
        most: int = 4,
        gpus: int | None = None,
        start_failure: float = 0.0,
        seed: int = 0,
        transfer_s: float = 0.0,
        policy: Callable[[Policy], Policy] = lambda policy: policy,
    ) -> None:
        self.clock = VirtualClock()
        self.log: list[tuple[str, int]] = []
        self.decisions: list[Decision] = []
        self.over: list[Request] = []
        self.wants_events = True
        self.plan: Mapping[Role, int] = {"mixed": ready}
        self.batch_at_risk = False
        self.profile = profile
        self.transfer_s = transfer_s
        self.fleet = FleetModel(
            clock=self.clock,
            cold_start=ColdStart(
                node_start_s=0.0,
                model_load_s=LOAD_S,
                warm_load_s=LOAD_S,
                warm_for_s=0.0,
                jitter=0.0,
            ),
            failures=Failures(start_failure=start_failure),
            seed=seed,
            make_engine=self.engine_of,
        )
        base = replace(make_chiron(ChironSettings()), fleet=self.decide, fleet_period_s=1.0, batch_size=None)
        model = ModelSpec(name="m0", kinds=(kind_of(profile),), min_instances=least, max_instances=most)
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self.fleet,
            journal=self,
            models=(model,),
            classes=CLASSES,
            policy=policy(base),
            gpus_max=None if gpus is None else {profile.gpu: gpus},
        )
        self.fleet.listener = self.plane
        self.plane.adopt("m0", ready, self.fleet.attach_running)
        self.plane.begin()

    def decide(self, settings: Any, state: Any, view: FleetView) -> tuple[FleetPlan, Any]:
        return {"m0": ModelPlan(counts=self.plan, reason="dictated", batch_at_risk=self.batch_at_risk)}, state

    def engine_of(self, instance: Instance) -> EngineModel:
        return EngineModel(
            clock=self.clock,
            instance=instance,
            profile=self.profile,
            times=StepTable(self.profile),
            listener=self.plane,
            kv_seconds_per_token=self.transfer_s,
        )

    # -- the Journal port ----------------------------------------------------------------

    def decided(self, now_s: float, decision: Decision) -> None:
        self.decisions.append(decision)

    def ended(self, request: Request) -> None:
        self.over.append(request)

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        self.log.append((name, request.id if request is not None else -1))

    # -- what a test does ----------------------------------------------------------------

    def send(self, id: int, tokens_out: int, cls: Any = CHAT, tokens_in: int = 8) -> Request:
        request = Request(id, "m0", cls, self.clock.now_s, tokens_in, tokens_out)
        self.plane.submit(request)
        return request

    def until(self, end_s: float) -> None:
        self.clock.run_until(end_s)

    def kill(self, instance: Instance | None) -> None:
        assert instance is not None
        self.fleet._fail(self.fleet.engines[instance.id])

    def states(self) -> list[str]:
        return sorted(i.state for i in self.plane.instances.values())

    def said(self, request: Request) -> list[str]:
        return [name for name, number in self.log if number == request.id]


def outcomes(requests: list[Request]) -> list[str | None]:
    return [request.outcome for request in requests]


# -- scaling down, and a burst ----------------------------------------------------------------


def test_a_burst_while_scaling_down_takes_draining_instances_back_before_new_ones_start() -> None:
    stage = Stage(ready=3)
    long = [stage.send(n, 400) for n in range(12)]
    stage.until(1.5)
    stage.plan = {"mixed": 1}
    stage.until(2.5)
    assert stage.states() == ["draining", "draining", "ready"]
    stage.plan = {"mixed": 3}
    burst = [stage.send(100 + n, 10) for n in range(6)]
    stage.until(3.5)
    assert stage.states() == ["ready", "ready", "ready"]
    assert sum(name == "created" for name, _ in stage.log) == 3, "no new instance was started"
    stage.until(60.0)
    assert set(outcomes(long + burst)) == {"finished"}


def test_an_instance_finishes_its_interactive_work_before_it_goes() -> None:
    stage = Stage(ready=2)
    requests = [stage.send(n, 300) for n in range(8)]
    stage.until(0.5)
    stage.plan = {"mixed": 1}
    stage.until(3.0)
    assert stage.states() == ["draining", "ready"]
    stage.until(60.0)
    assert outcomes(requests) == ["finished"] * 8
    assert all(request.evictions == 0 for request in requests)
    assert stage.states() == ["ready"]


def test_batch_work_on_a_draining_instance_moves_on_after_the_drain_timeout() -> None:
    stage = Stage(ready=2, transfer_s=1e-6, policy=lambda policy: replace(policy, drain_timeout_s=2.0))
    jobs = [stage.send(n, 2000, SOMEDAY) for n in range(6)]
    stage.until(0.5)
    stage.plan = {"mixed": 1}
    stage.until(2.5)
    assert stage.states() == ["draining", "ready"]
    stage.until(4.5)
    assert stage.states() == ["ready"]
    stage.until(300.0)
    assert outcomes(jobs) == ["finished"] * 6
    moved = [job for job in jobs if job.evictions]
    assert moved
    assert all(job.tokens_done == 2000 for job in jobs)
    names = [name for name, _ in stage.log]
    assert names.count("evicted") == len(moved) > 1
    assert names.index("gone") > max(n for n, name in enumerate(names) if name == "evicted"), "drained, then removed"


def test_an_instance_told_to_go_while_it_starts_goes_at_once_and_never_gets_ready() -> None:
    stage = Stage(ready=1)
    stage.plan = {"mixed": 2}
    stage.until(1.5)
    assert stage.states() == ["ready", "starting"]
    stage.plan = {"mixed": 1}
    stage.until(20.0)
    assert stage.states() == ["ready"]
    assert sum(name == "ready" for name, _ in stage.log) == 1


# -- an instance dies ----------------------------------------------------------------


def test_an_interactive_request_whose_client_has_seen_tokens_fails_with_its_instance() -> None:
    stage = Stage(ready=1)
    request = stage.send(1, 300)
    stage.until(1.0)
    assert request.first_token_s > 0
    stage.kill(request.instance)
    assert request.outcome == "failed"
    stage.until(30.0)
    assert stage.said(request) == ["arrival", "dispatch", "first_token", "ended"]


def test_an_interactive_request_that_nobody_saw_a_token_of_starts_again_elsewhere() -> None:
    stage = Stage(ready=2)
    request = stage.send(1, 10, tokens_in=320)  # Ten steps of prefill.
    stage.until(2 * TICK_S)
    first = request.instance
    stage.kill(first)
    assert request.instance is not None
    assert request.instance is not first
    stage.until(30.0)
    assert request.outcome == "finished"
    assert request.retries == 1
    assert stage.said(request) == ["arrival", "dispatch", "dispatch", "first_token", "ended"]


def test_an_instance_that_loses_requests_is_avoided_only_shortly_when_it_is_the_only_one() -> None:
    pair, alone = Stage(ready=2), Stage(ready=1)
    for stage in (pair, alone):
        bad = stage.plane.instances[1]
        stage.plane.avoid(bad, 8.0)
        request = stage.send(1, 5)
        stage.until(AVOID_ALONE_S)
        assert request.instance is not bad or stage is alone
        stage.until(2.0)
        assert request.outcome == "finished"
    assert alone.over[0].dispatch_s == AVOID_ALONE_S
    assert pair.over[0].dispatch_s == 0.0
    crowd = [pair.send(number, 200) for number in range(2, 6)]
    assert all(request.instance is not pair.plane.instances[1] for request in crowd), "still avoided"


def test_a_batch_request_resumes_once_after_its_instance_died() -> None:
    stage = Stage(ready=2)
    job = stage.send(1, 300, NIGHT)
    stage.until(1.0)
    stage.kill(job.instance)
    stage.until(60.0)
    assert job.outcome == "finished"
    assert stage.said(job) == ["arrival", "dispatch", "first_token", "dispatch", "ended"]


def test_a_request_that_kills_every_instance_is_given_up() -> None:
    stage = Stage(ready=1)
    job = stage.send(1, 3000, NIGHT)
    for round in range(1, RETRIES_MAX + 2):
        stage.until(stage.clock.now_s + LOAD_S + 2.0)
        assert job.retries == round - 1
        stage.kill(job.instance)
    assert job.outcome == "failed"


def test_a_death_in_the_middle_of_an_eviction_loses_nothing() -> None:
    stage = Stage(profile=replace(ROOMY, max_num_seqs=1), ready=1, transfer_s=1e-6)
    job = stage.send(1, 200, NIGHT)
    stage.until(1.0)
    chat = stage.send(2, 50)  # Evicts the job at the next step boundary.
    (instance,) = stage.plane.instances.values()
    assert list(instance.evicting) == [1]
    stage.kill(instance)
    stage.until(60.0)
    assert outcomes([job, chat]) == ["finished", "finished"]
    assert job.kv_saved_tokens == 0


def test_an_instance_that_dies_while_draining_is_forgotten_once() -> None:
    stage = Stage(ready=2)
    requests = [stage.send(n, 400) for n in range(8)]
    stage.until(0.5)
    stage.plan = {"mixed": 1}
    stage.until(1.5)
    (draining,) = [i for i in stage.plane.instances.values() if i.state == "draining"]
    stage.kill(draining)
    stage.until(60.0)
    assert stage.states() == ["ready"]
    assert sorted(outcomes(requests)) == ["failed"] * 4 + ["finished"] * 4  # type: ignore[type-var]


# -- starts ----------------------------------------------------------------


def test_starts_that_fail_are_tried_again_and_cost_what_they_took() -> None:
    stage = Stage(ready=0, start_failure=0.5, seed=2)
    stage.plan = {"mixed": 1}
    stage.until(1.0)
    request = stage.send(1, 10)
    stage.until(120.0)
    assert request.outcome == "finished"
    failed = sum(name == "failed" for name, _ in stage.log)
    assert failed >= 1, "the story needs a failure"
    stage.fleet.close()
    ready_s = 1.0 + (failed + 1) * LOAD_S
    assert stage.fleet.bill.gpu_seconds["m0"] == 120.0 - 1.0
    assert request.dispatch_s == ready_s


def test_from_zero_every_request_waits_for_the_first_instance_and_none_is_lost() -> None:
    stage = Stage(ready=0)
    waiting = [stage.send(n, 5, cls) for n, cls in enumerate((CHAT, AGENT, NIGHT, SOMEDAY) * 3)]
    stage.until(5.0)
    assert outcomes(waiting) == [None] * 12
    assert stage.plane.open_requests == 12
    stage.plan = {"mixed": 1}
    stage.until(30.0)
    assert outcomes(waiting) == ["finished"] * 12
    assert min(request.dispatch_s for request in waiting) == 6.0 + LOAD_S


def test_to_zero_drains_first_and_what_comes_later_is_held() -> None:
    stage = Stage(ready=1)
    running = stage.send(1, 200)
    stage.plan = {"mixed": 0}
    stage.until(1.5)
    late = stage.send(2, 5)
    stage.until(20.0)
    assert running.outcome == "finished"
    assert late.outcome is None
    assert stage.states() == []
    stage.plan = {"mixed": 1}
    stage.until(60.0)
    assert late.outcome == "finished"


def test_at_the_gpu_limit_no_instance_is_made_until_one_has_gone() -> None:
    stage = Stage(ready=2, gpus=2)
    long = [stage.send(n, 300) for n in range(8)]
    stage.plan = {"mixed": 4}
    stage.until(2.5)
    assert stage.states() == ["ready", "ready"]
    stage.kill(next(iter(stage.plane.instances.values())))
    stage.until(2.6)
    assert stage.states() == ["ready", "starting"]
    assert stage.fleet.bill.gpus_peak == 2
    stage.until(60.0)
    assert all(request.outcome is not None for request in long)


def test_a_plan_outside_the_bounds_is_cut_to_them() -> None:
    stage = Stage(ready=1, least=1, most=2)
    stage.plan = {"mixed": 3, "batch": 9}
    stage.until(1.5)
    assert len(stage.plane.instances) == 2
    stage.plan = {}
    stage.until(30.0)
    assert stage.states() == ["ready"]


# -- eviction and cancelling ----------------------------------------------------------------


def test_interactive_work_takes_the_place_of_batch_work_and_never_the_reverse() -> None:
    stage = Stage(ready=1)
    jobs = [stage.send(n, 300, NIGHT) for n in range(3)]
    stage.until(1.0)
    chats = [stage.send(10 + n, 50) for n in range(4)]
    more = [stage.send(20 + n, 50, NIGHT) for n in range(4)]
    stage.until(1.0 + 4 * TICK_S)
    (instance,) = stage.plane.instances.values()
    assert [r.id for r in instance.requests.values() if r.interactive] == [10, 11, 12, 13]
    assert [job.evictions for job in jobs] == [1, 1, 1]
    stage.until(120.0)
    assert set(outcomes(jobs + chats + more)) == {"finished"}
    assert all(chat.evictions == 0 for chat in chats)


def test_after_an_eviction_batch_work_is_replaced_but_takes_no_more_room() -> None:
    stage = Stage(policy=lambda policy: replace(policy, eviction_pause_s=8.0))
    nights = [stage.send(n, length, NIGHT) for n, length in enumerate((120, 4000, 4000, 4000, 4000, 4000))]
    stage.until(1.0)
    (instance,) = stage.plane.instances.values()
    assert len(instance.batch) == 4
    chat = stage.send(10, 100)
    stage.until(1.5)
    assert (len(instance.batch), chat.first_token_s >= 0.0) == (3, True)
    stage.until(6.0)
    assert nights[0].outcome == chat.outcome == "finished"
    assert len(instance.batch) == 3, "the one that ended was replaced; the place of the chat is kept for the next"
    stage.send(11, 100)
    stage.until(6.5)
    assert stage.plane.evictions == 1
    stage.until(11.0)
    assert len(instance.batch) == 4


def test_for_prefill_that_waits_batch_work_leaves_and_comes_back_once_nobody_waits() -> None:
    stage = Stage(profile=replace(ROOMY, max_num_seqs=16), policy=lambda policy: replace(policy, eviction_pause_s=30.0))
    nights = [stage.send(n, 2000, NIGHT) for n in range(8)]
    stage.until(1.0)
    (instance,) = stage.plane.instances.values()
    assert len(instance.batch) == 8
    instance.prefill_limit_s = 1e-6  # One prompt at a time; each takes 20 steps, a third of the TTFT.
    chats = [stage.send(10 + n, 10, tokens_in=640) for n in range(2)]
    stage.until(1.05)
    chats.append(stage.send(12, 10))
    assert len(instance.batch) == 8
    stage.until(1.15)
    chats.append(stage.send(13, 10))
    assert not instance.batch, "the second chat has waited a tenth of its TTFT"
    stage.until(2.5)
    assert set(outcomes(chats)) == {"finished"}
    assert len(instance.batch) == 8, "the pause is for places, not for steps"
    stage.until(60.0)
    assert set(outcomes(nights)) == {"finished"}


def relieved(*, at_risk: bool) -> tuple[Stage, float]:
    """Eight nights, evicted at 30 s for the prefill of chats that take less than two seconds, and for how long they
    are to stay away."""
    stage = Stage(profile=replace(ROOMY, max_num_seqs=16))
    for n in range(8):
        stage.send(n, 4000, NIGHT, tokens_in=5000)
    stage.batch_at_risk = at_risk
    stage.until(30.0)
    (instance,) = stage.plane.instances.values()
    assert len(instance.batch) == 8
    learner = stage.plane.models["m0"].learner
    redone_s = sum(prefill_s(learner, r.input_tokens + r.tokens_done) for r in instance.batch.values())
    instance.prefill_limit_s = 1e-6
    for n in range(2):
        stage.send(10 + n, 10, tokens_in=640)
    stage.until(30.15)
    stage.send(13, 10)
    assert not instance.batch
    away_s = redone_s / REDONE_MAX
    assert away_s > 10.0
    return stage, away_s


def running(stage: Stage) -> tuple[int, int]:
    (instance,) = stage.plane.instances.values()
    return instance.running_interactive, len(instance.batch)


def test_what_made_way_for_prefill_stays_away_in_proportion_to_what_it_has_to_prefill_again() -> None:
    stage, away_s = relieved(at_risk=False)
    stage.until(30.0 + away_s)
    assert running(stage) == (0, 0)
    stage.until(32.0 + away_s + 8 * 8000 / 32 * TICK_S)
    assert running(stage) == (0, 8)


def test_what_is_at_risk_comes_back_as_soon_as_nobody_waits() -> None:
    stage, _ = relieved(at_risk=True)
    stage.until(32.0)
    assert running(stage)[1] > 0


def test_what_is_found_at_risk_stays_away_no_longer_than_from_a_place_that_a_burst_took() -> None:
    stage, away_s = relieved(at_risk=False)
    stage.batch_at_risk = True
    stage.until(34.0)
    assert running(stage) == (0, 0)
    stage.until(37.5)
    assert running(stage)[1] > 0
    assert away_s > 7.5


def test_a_cancelled_request_frees_its_place_and_is_no_eviction() -> None:
    stage = Stage(ready=1)
    running = [stage.send(n, 1000) for n in range(4)]
    waiting = stage.send(5, 10)
    stage.until(1.0)
    assert waiting.dispatch_s < 0
    stage.plane.cancel(running[0])
    stage.until(2.0)
    assert running[0].outcome == "cancelled"
    assert waiting.outcome == "finished"
    assert running[0].evictions == stage.plane.evictions == 0
    assert stage.said(running[0]) == ["arrival", "dispatch", "first_token", "ended"]
    (instance,) = stage.plane.instances.values()
    assert instance.eviction_pause_until_s < 0, "batch work need not keep away"


def test_a_request_cancelled_while_it_is_being_evicted_does_not_come_back() -> None:
    stage = Stage(profile=replace(ROOMY, max_num_seqs=1), ready=1)
    job = stage.send(1, 500, NIGHT)
    stage.until(1.0)
    chat = stage.send(2, 10)
    (instance,) = stage.plane.instances.values()
    assert list(instance.evicting) == [1]
    stage.plane.cancel(job)
    assert job.outcome == "cancelled"
    stage.until(30.0)
    assert chat.outcome == "finished"
    assert stage.said(job) == ["arrival", "dispatch", "first_token", "ended"]
    assert not instance.requests
    assert not instance.evicting


def test_cancelled_requests_leave_the_queues_at_once_and_let_the_next_one_go() -> None:
    small = replace(ROOMY, kv_capacity_tokens=900)
    stage = Stage(profile=small, ready=1)
    stage.send(1, 400, tokens_in=100)
    large = stage.send(2, 10, tokens_in=500)
    little = stage.send(3, 10, tokens_in=10)
    stage.until(0.5)
    assert large.dispatch_s < 0
    assert little.dispatch_s < 0, "first come, first served"
    stage.plane.cancel(large)
    assert little.dispatch_s == 0.5
    empty = Stage(ready=0)
    jobs = [empty.send(n, 10, NIGHT) for n in range(5)]
    chats = [empty.send(10 + n, 10) for n in range(5)]
    for request in (jobs[1], jobs[4], chats[0], chats[3]):
        empty.plane.cancel(request)
        empty.plane.cancel(request)
    state = empty.plane.models["m0"]
    assert (len(state.batch), len(state.waiting)) == (3, 3)
    assert state.waiting.input_tokens == 3 * 8
    assert [view.requests for view in state.batch.views(state.learner.expected_output)] == [3]
    empty.plan = {"mixed": 1}
    empty.until(30.0)
    assert [r.id for r in (*jobs, *chats) if r.outcome == "finished"] == [0, 2, 3, 11, 12, 14]
    assert empty.plane.open_requests == 0
