"""A batch prompt that the router has no room for yet is passed by shorter ones, if the policy's order lets them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiron.core.types import Placement, Request
from chiron.policies.policy import Estimates, Policy, PolicyEntry
from chiron.policies.queues.deadline_groups import DeadlineGroups
from chiron.policies.queues.order import KeyOrder
from chiron.policies.registry import POLICIES, make_policy
from chiron.policies.rivals.scalers.static import StaticSettings
from chiron.policies.routers.least import LeastRouter
from scenario_factory import run, setup_of

NIGHT = 2
LONG, SHORT, SHORTER, SHORTEST = range(4)


class Reluctant:
    """A router that takes prompts of 40 tokens and more only once ``after`` shorter ones have been placed."""

    def __init__(self, estimates: Estimates, after: int) -> None:
        self._router = router = LeastRouter(estimates, lambda instance: len(instance.requests))
        self._after = after
        self.room_tokens = 39
        self.add = router.add
        self.remove = router.remove
        self.changed = router.changed
        self.relieve = router.relieve

    def place(self, request: Request, waited_s: float) -> Placement | None:
        if request.input_tokens >= 40 and self._after > 0:
            return None
        self._after -= 1
        return self._router.place(request, waited_s)


def dispatched(monkeypatch: pytest.MonkeyPatch, order_batch: Any, after: int) -> list[int]:
    def make(settings: StaticSettings) -> Policy:
        base = make_policy("static", settings)
        return replace(base, order_batch=order_batch, place=lambda _, estimates: Reluctant(estimates, after))

    monkeypatch.setitem(POLICIES, "reluctant", PolicyEntry(settings=StaticSettings, make=make, about="for tests"))
    rows = [(n / 64, tokens, 5, 0, NIGHT) for n, tokens in enumerate((50, 30, 20, 10))]
    log = run(setup_of(rows, policy="reluctant")).events
    return [event["request"] for event in log if event["event"] == "dispatch"]


def test_shorter_ones_pass_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = dispatched(monkeypatch, lambda *_: DeadlineGroups(300.0), after=3)
    assert order == [SHORT, SHORTER, SHORTEST, LONG]


def test_an_order_that_lets_nobody_pass_keeps_to_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatched(monkeypatch, lambda *_: KeyOrder(lambda request: request.arrival_s), after=3) == []
    shortest_first = dispatched(monkeypatch, lambda *_: KeyOrder(lambda request: request.input_tokens), after=1)
    assert shortest_first == [SHORT, LONG, SHORTER, SHORTEST]
