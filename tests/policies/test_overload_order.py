"""The order of waiting requests in an overload: who makes way, who shares, who is refused."""

from __future__ import annotations

from collections import Counter
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiron.core.types import Request, RequestClass
from chiron.policies.policy import Estimates
from chiron.policies.queues.overload import OverloadOrder, OverloadSettings
from chiron.policies.views import StepTimes

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0)
TIGHT = RequestClass(name="tight", kind="interactive", ttft_s=1.0)
HEAVY = RequestClass(name="heavy", kind="interactive", ttft_s=5.0, weight=3.0)
LEAD_S = 0.2
STEP_TIMES = StepTimes(
    fixed_s=0.01, per_sequence_s=1e-3, per_context_token_s=0.0, per_prefill_token_s=1e-4, per_prefill_square_s=0.0
)


def known() -> Estimates:
    """A prompt of 1,000 tokens takes 0.1 s to prefill, an answer of 100 tokens 0.1 s of its own."""
    estimates = Estimates(STEP_TIMES, ttft_max_s=inf)
    estimates.prefill_token_s, estimates.prefill_square_s = 1e-4, 0.0
    estimates.expected_output = dict.fromkeys(("chat", "tight", "heavy"), 100.0)
    estimates.first_token_lead_s = dict.fromkeys(("chat", "tight", "heavy"), LEAD_S)
    return estimates


def order_of(**settings: float | bool) -> OverloadOrder:
    return OverloadOrder(OverloadSettings(**settings), known())  # type: ignore[arg-type]


def request(id: int, arrival_s: float, cls: RequestClass = CHAT, tenant: str = "", tokens: int = 1000) -> Request:
    made = Request(id, "m", cls, arrival_s, tokens)
    made.tenant = tenant
    return made


def serve(order: OverloadOrder, now_s: float) -> Request | None:
    """One turn."""
    head = order.head(now_s)
    if head is not None:
        order.remove_head(head, now_s)
        head.outcome = "finished"
    return head


def test_while_all_can_be_on_time_the_earliest_deadline_goes_first() -> None:
    order = order_of()
    for made in (request(0, 0.0), request(1, 0.1, TIGHT), request(2, 0.2), request(3, 0.3, TIGHT)):
        order.add(made, made.arrival_s)
    served = [serve(order, 0.4) for _ in range(4)]
    assert [r.id for r in served if r] == [1, 3, 0, 2]


def test_a_request_is_given_up_before_its_deadline_by_its_prefill_and_the_usual_lead() -> None:
    """Deadline 5 s, prefill 0.1 s, lead 0.2 s: at 4.7 s it can still be on time."""
    for now_s, first in ((4.69, 0), (4.71, 1)):
        order = order_of(fair=False)
        order.add(request(0, 0.0), 0.0)
        order.add(request(1, 1.0), 1.0)
        head = order.head(now_s)
        assert head is not None
        assert head.id == first


def test_a_longer_prompt_is_given_up_sooner() -> None:
    order = order_of(fair=False)
    order.add(request(0, 0.0, tokens=20_000), 0.0)  # 2 s of prefill: lost at 2.8 s.
    order.add(request(1, 1.0), 1.0)
    head = order.head(2.81)
    assert head is not None
    assert head.id == 1


def test_lost_requests_get_every_fortieth_turn_while_others_wait_and_all_when_none_does() -> None:
    order = order_of(fair=False)
    for id in range(5):
        order.add(request(id, 0.0), 0.0)
    for id in range(100, 200):
        order.add(request(id, 10.0), 10.0)
    served = [serve(order, 10.0) for _ in range(105)]
    late = [turn for turn, r in enumerate(served) if r is not None and r.id < 100]
    assert late[:2] == [40, 81]
    assert late[2:] == [102, 103, 104]


def test_an_overload_of_one_class_is_not_another_s() -> None:
    """Once somebody was lost, a class within its share goes first, as the deadlines of the other come nearer."""
    order = order_of()
    order.add(request(0, 0.0), 0.0)
    for id in range(1, 100):
        order.add(request(id, 1.0), 1.0)
    assert (first := serve(order, 4.75)) is not None
    assert first.id != 0
    order.add(request(200, 5.0, TIGHT), 5.0)
    order.add(request(201, 5.0, TIGHT), 5.0)
    assert {r.id for r in (serve(order, 5.0), serve(order, 5.0), serve(order, 5.0)) if r} >= {200, 201}


def test_classes_share_an_overload_by_weight() -> None:
    order = order_of()
    order.add(request(0, 0.0), 0.0)
    for id in range(1, 400):
        order.add(request(id, 4.0, CHAT if id % 2 else HEAVY), 4.0)
    counts = Counter(r.cls.name for _ in range(100) if (r := serve(order, 4.9)))
    assert counts["heavy"] == pytest.approx(75, abs=2)


def test_keys_of_a_class_share_an_overload_equally() -> None:
    order = order_of()
    order.add(request(0, 0.0, tenant="greedy"), 0.0)
    for id in range(1, 400):
        order.add(request(id, 4.0, tenant="greedy"), 4.0)
    for id in range(400, 420):
        order.add(request(id, 4.5, tenant="modest"), 4.5)
    served = Counter(r.tenant for _ in range(40) if (r := serve(order, 4.9)))
    assert served["modest"] == pytest.approx(20, abs=1)


def test_a_turn_of_a_request_that_never_ran_is_given_back() -> None:
    """The engine refuses two of three of one key's requests: as many of it run as of the other key's."""
    order = order_of()
    order.add(request(0, 0.0), 0.0)
    for id in range(1, 201):
        order.add(request(id, 4.0, tenant="refused" if id % 2 else "other"), 4.0)
    ran: Counter[str] = Counter()
    for _ in range(60):
        turn = serve(order, 4.9)
        assert turn is not None
        if turn.tenant == "refused" and turn.id % 3:
            order.never_ran(turn)
        else:
            ran[turn.tenant] += 1
    assert ran["refused"] == pytest.approx(ran["other"], abs=1)


def test_who_was_away_has_saved_up_no_turns() -> None:
    order = order_of()
    order.add(request(0, 0.0), 0.0)
    for id in range(1, 200):
        order.add(request(id, 4.0), 4.0)
    for _ in range(50):
        serve(order, 4.9)
    for id in range(200, 300):
        order.add(request(id, 4.9, HEAVY), 4.9)
    counts = Counter(r.cls.name for _ in range(40) if (r := serve(order, 4.95)))
    assert counts["chat"] == pytest.approx(10, abs=2)


def test_sharing_ends_some_time_after_the_last_loss() -> None:
    order = order_of(hold_s=30.0)
    order.add(request(0, 0.0), 0.0)
    order.head(5.0)  # Lost.
    for now_s, first in ((20.0, 11), (40.0, 20)):
        if now_s == 40.0:
            order.add(request(20, 36.0), 36.0)
            order.add(request(21, 39.9, HEAVY), 39.9)
        else:
            order.add(request(10, 19.0), 19.0)
            serve(order, 19.0)
            order.add(request(12, 19.1), 19.1)
            order.add(request(11, 19.9, HEAVY), 19.9)
        head = serve(order, now_s)
        assert head is not None
        assert head.id == first
        while serve(order, now_s):
            pass


def test_a_prompt_that_could_never_be_on_time_starts_no_sharing() -> None:
    order = order_of()
    order.add(request(0, 0.0, tokens=60_000), 0.0)  # 6 s of prefill.
    order.add(request(1, 0.0), 0.0)
    order.add(request(2, 0.1, TIGHT), 0.1)
    assert [r.id for _ in range(3) if (r := serve(order, 0.2))] == [2, 1, 0]


def test_whoever_would_be_lost_before_its_turn_is_refused_and_told_when_to_come_back() -> None:
    order = order_of(refuse=True)
    order.add(request(0, 0.0), 0.0)
    refused: list[float] = []
    for step in range(300):  # 10 requests/s come; 5/s are served, each of 0.2 s: one second of work a second.
        now_s = 4.0 + 0.1 * step
        made = request(1 + step, now_s)
        refusal = order.admit(made, now_s)
        if refusal is None:
            order.add(made, now_s)
        elif step >= 200:
            refused.append(refusal.retry_after_s)
        if step % 2:
            serve(order, now_s)
    assert len(refused) == pytest.approx(50, abs=10)
    assert all(1.0 <= retry_after_s < 5.0 for retry_after_s in refused)
    in_time = sum(1 for waiting in order if waiting.arrival_s > now_s - 4.7)
    assert in_time == pytest.approx(5 * 4.7, rel=0.3)
    assert order.admit(request(1000, now_s, tenant="other"), now_s) is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("add", "serve", "end", "wait")),
            st.integers(0, 2),
            st.integers(0, 2),
            st.floats(0.0, 8.0),
        ),
        max_size=120,
    ),
    st.booleans(),
    st.booleans(),
)
def test_every_request_has_its_turn_or_ends_and_nobody_has_two(
    steps: list[tuple[str, int, int, float]], fair: bool, relegate: bool
) -> None:
    order = order_of(fair=fair, relegate=relegate, late_turn=3, hold_s=2.0)
    waiting: dict[int, Request] = {}
    now_s, id = 0.0, 0
    for action, cls, tenant, amount in steps:
        if action == "add":
            made = request(id, now_s - amount / 2, (CHAT, TIGHT, HEAVY)[cls], f"t{tenant}", 1 + int(amount * 2000))
            id += 1
            waiting[made.id] = made
            order.add(made, now_s)
        elif action == "serve":
            head = serve(order, now_s)
            assert (head is None) == (not waiting)
            if head is not None:
                del waiting[head.id]
        elif action == "end" and waiting:
            ended = waiting.pop(list(waiting)[cls % len(waiting)])
            ended.outcome = "cancelled"
            order.forget(ended)
        else:
            now_s += amount
        assert {r.id for r in order} == set(waiting)
        assert (order.oldest_arrival_s() < float("inf")) == bool(waiting)
    turns = [serve(order, now_s) for _ in range(len(waiting))]
    assert {r.id for r in turns if r is not None} == set(waiting)
    assert serve(order, now_s) is None
