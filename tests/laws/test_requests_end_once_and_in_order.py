"""Laws 1, 2 and 7, read from the event log of random simulations: nothing is lost, doubled, or out of order."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings

from chiron.sim.setup import Setup
from effort import examples
from scenario_factory import CLASSES, Run, WildSettings, run, setups


@given(setups())
@settings(max_examples=examples(200))
def test_requests_and_instances_keep_to_their_order_in_any_simulation(setup: Setup) -> None:
    """Each law is read from the same runs: simulating is what takes the time."""
    done = run(setup)
    check_every_request_is_somewhere_and_ends_at_most_once(done)
    check_time_never_goes_back(done)
    check_instances_are_drained_before_they_go_and_take_no_work_unless_ready(done)
    check_interactive_requests_are_never_evicted_and_evicted_work_finishes_once(setup, done)
    check_plans_and_gpus_stay_within_their_bounds(setup, done)


def check_every_request_is_somewhere_and_ends_at_most_once(done: Run) -> None:
    place: dict[int, int | None] = {}
    """Where each request is that has arrived and not ended: an instance, or None for the queue."""
    ended: set[int] = set()
    for event in done.events:
        name, number, instance = event["event"], event.get("request", -1), event.get("instance", -1)
        if number < 0:
            if name == "failed":
                place = {i: None if at == instance else at for i, at in place.items()}
            continue
        assert number not in ended, f"{name} of request {number}, which has ended"
        if name == "arrival":
            assert number not in place
            place[number] = None
        elif name == "dispatch":
            assert place[number] is None, "it runs in one place at a time"
            place[number] = instance
        elif name in ("first_token", "evicted"):
            assert place[number] == instance
            if name == "evicted":
                place[number] = None
        else:
            assert name == "ended"
            del place[number]
            ended.add(number)
    table = done.result.requests
    arrived = int((table.arrival_s <= 60.0).sum())
    assert len(ended) + len(place) == arrived
    assert len(place) == done.simulation.plane.open_requests
    assert np.flatnonzero(table.outcome != 4).tolist() == sorted(ended)


def check_time_never_goes_back(done: Run) -> None:
    times = [event["t"] for event in done.events]
    assert times == sorted(times)
    table = done.result.requests
    ran = table.dispatch_s >= 0
    assert (table.arrival_s[ran] <= table.dispatch_s[ran]).all()
    answered = table.first_token_s >= 0
    assert (table.dispatch_s[answered] <= table.first_token_s[answered]).all()
    finished = table.outcome == 0
    assert answered[finished].all()
    assert (table.first_token_s[finished] <= table.finish_s[finished]).all()


def check_instances_are_drained_before_they_go_and_take_no_work_unless_ready(done: Run) -> None:
    state: dict[int, str] = {}
    held: dict[int, set[int]] = {}
    follows: dict[str, set[str | None]] = {
        "created": {None},
        "ready": {"created", "draining"},
        "draining": {"ready"},
        "gone": {"created", "draining"},
        "failed": {"created", "ready", "draining"},
    }
    for event in done.events:
        name, number, instance = event["event"], event.get("request", -1), event.get("instance", -1)
        if number < 0:
            if name != "decision":
                assert state.get(instance) in follows[name], f"{name} after {state.get(instance)}"
                state[instance] = name
                if name == "gone":
                    assert not held.get(instance), "it still held requests"
        elif name == "dispatch":
            assert state[instance] == "ready"
            held.setdefault(instance, set()).add(number)
        elif name in ("evicted", "ended") and instance >= 0:
            held[instance].discard(number)
        elif name == "ended":
            for inside in held.values():
                inside.discard(number)


def check_interactive_requests_are_never_evicted_and_evicted_work_finishes_once(setup: Setup, done: Run) -> None:
    events = done.events
    classes = {e["request"]: e["class"] for e in events if e["event"] == "arrival"}
    interactive = {c.name for c in CLASSES if c.interactive}
    # Migration shows as eviction, too.
    moves = (isinstance(setup.settings, WildSettings) and setup.settings.migrates) or "llumnix" in setup.policy
    evicted = {e["request"] for e in events if e["event"] == "evicted"}
    if not moves:
        assert not [i for i in evicted if classes[i] in interactive]
    ends = Counter(e["request"] for e in events if e["event"] == "ended")
    assert all(ends[i] <= 1 for i in evicted)
    table = done.result.requests
    assert not table.evictions[np.isin(table.cls, [i for i, c in enumerate(CLASSES) if c.interactive])].any()


def check_plans_and_gpus_stay_within_their_bounds(setup: Setup, done: Run) -> None:
    bounds = {m.name: m for m in setup.models}
    for decision in done.result.decisions:
        if decision.kind in ("fleet", "role"):
            model = bounds[decision.subject]
            assert model.min_instances <= decision.after <= model.max_instances
        elif decision.kind == "batch_size":
            assert 1 <= decision.after <= max(p.max_num_seqs for p in setup.profiles.values())
        assert decision.reason
        assert " " not in decision.reason
    check_gpus(setup, done)


def check_gpus(setup: Setup, done: Run) -> None:
    """GPUs at every moment of the log, and instances that are not draining. Where roles are labels these never exceed
    the model's bound; else a role's successor may start before its predecessor drains."""
    live: dict[str, set[int]] = {m.name: set() for m in setup.models}
    held: set[int] = set()
    # An instance's kind is not in the log: count the fewest GPUs that it can have.
    limit = sum(setup.gpus_max.values()) if setup.gpus_max else 10_000
    gpus_least = min(kind.gpus for m in setup.models for kind in m.kinds)
    most = {m.name: m.max_instances for m in setup.models}
    labels = done.simulation.policy.label is not None
    for event in done.events:
        name, instance = event["event"], event.get("instance", -1)
        if "request" in event or name == "decision":
            continue
        serving = live[event["model"]]
        if name in ("created", "ready"):
            serving.add(instance)
            held.add(instance)
        else:
            serving.discard(instance)
            if name != "draining":
                held.discard(instance)
        assert len(serving) <= most[event["model"]] or not labels
        assert len(held) * gpus_least <= limit
    assert done.result.summary["gpus_peak"] <= limit
