"""A policy that sets no hook runs: requests go to the instance with the fewest, and the fleet stays."""

from __future__ import annotations

import pytest

from chiron.policies.instances import label_by_rank, take_back_fullest
from chiron.policies.policy import Policy, PolicyEntry
from chiron.policies.registry import POLICIES
from chiron.policies.rivals.scalers.static import StaticSettings
from chiron.policies.views import InstanceView
from scenario_factory import everything, example_setup, run


def test_a_policy_without_hooks_does_as_static_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(settings: StaticSettings) -> Policy:
        return Policy(name="bare", settings=settings)

    monkeypatch.setitem(POLICIES, "bare", PolicyEntry(settings=StaticSettings, make=bare, about="no hook"))
    done, static = run(example_setup("bare")), run(example_setup("static"))
    assert everything(done) | {"summary": ""} == everything(static) | {"summary": ""}, "all but its name"
    assert done.result.summary["finished"] > 100


def test_the_fullest_instance_is_taken_back_and_of_equals_the_older() -> None:
    def view(id: int, dispatched: int) -> InstanceView:
        return InstanceView(
            id=id,
            role="mixed",
            state="draining",
            age_s=9.0,
            dispatched=dispatched,
            dispatched_interactive=dispatched,
            max_batch_size=8,
            kv_capacity_tokens=100,
            sample_age_s=1.0,
            running=0,
            waiting=0,
            waiting_tokens=0,
            head_tokens=0,
            kv_used_tokens=0,
            itl_s=0.1,
        )

    draining = [view(1, 2), view(2, 5), view(3, 5)]
    assert take_back_fullest(None, draining) == 2
    assert take_back_fullest(None, [one._replace(dispatched=0) for one in draining]) == 1


def test_labels_are_in_order_of_rank() -> None:
    assert label_by_rank(None, {"interactive": 1, "mixed": 2, "batch": 1}) == ["interactive", "mixed", "mixed", "batch"]
    assert label_by_rank(None, {"interactive": 0, "mixed": 0, "batch": 0}) == []
