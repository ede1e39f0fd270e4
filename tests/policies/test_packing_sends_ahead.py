"""A prompt that only another prompt keeps waiting, on engines of which is heard when the next step has begun."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Instance, InstanceKind, Request, RequestClass, Role
from chiron.policies.routers.packing import PackingRouter, PackingSettings

KIND = InstanceKind(name="a", gpu="a100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=256)
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=0.1, itl_s=0.05)
JOBS = RequestClass(name="jobs", kind="batch")
PROMPT_S = 0.03
"""What a prompt of 500 tokens takes, as a learner that has seen nothing takes it to be."""


def fleet(
    *backlogs_s: float, late: bool = True, role: Role = "mixed", ahead: bool = True, missed: float = 0.0
) -> tuple[PackingRouter, list[Instance]]:
    learner = Learner((CHAT, JOBS))
    learner.ttft_min_s = CHAT.ttft_s
    learner.itl_missed = missed
    router = PackingRouter(
        PackingSettings(), learner, evicts=True, keeps_apart=True, spreads_long=0.003, sends_ahead=ahead
    )
    instances = [Instance(n, "m", KIND, role, 0.0) for n in range(1, len(backlogs_s) + 1)]
    for instance, backlog_s in zip(instances, backlogs_s, strict=True):
        instance.state = "ready"
        instance.heard_late = late
        instance.prefill_backlog_s = backlog_s
        router.add(instance)
    return router, instances


def goes_to(router: PackingRouter, tokens: int = 500, cls: RequestClass = CHAT) -> int | None:
    placement = router.place(Request(1, "m", cls, 0.0, tokens), 0.0)
    return None if placement is None else placement.instance.id


def test_it_goes_behind_one_of_its_length_and_waits_where_the_end_of_that_is_heard_of_at_once() -> None:
    assert goes_to(fleet(PROMPT_S)[0]) == 1
    assert goes_to(fleet(PROMPT_S, late=False)[0]) is None
    assert goes_to(fleet(PROMPT_S, ahead=False)[0]) is None


def test_it_goes_where_nothing_waits_before_it_goes_behind_another_and_then_behind_the_shortest() -> None:
    assert goes_to(fleet(PROMPT_S, 0.0)[0]) == 2
    assert goes_to(fleet(1.2 * PROMPT_S, PROMPT_S, 1.1 * PROMPT_S)[0]) == 2


@pytest.mark.parametrize(
    ("backlog_s", "tokens"),
    [
        pytest.param(2 * PROMPT_S, 500, id="two wait there"),
        pytest.param(PROMPT_S, 350, id="a longer one waits there"),
        pytest.param(0.04, 700, id="both together take most of its TTFT"),
    ],
)
def test_it_waits_where_it_would_be_late_or_is_better_off_elsewhere(backlog_s: float, tokens: int) -> None:
    assert goes_to(fleet(backlog_s)[0], tokens) is None


def test_it_waits_where_a_prefill_is_little_of_its_ttft() -> None:
    for ttft_s, placed in ((9 * PROMPT_S, 1), (11 * PROMPT_S, None), (8.0, None)):
        assert goes_to(fleet(PROMPT_S)[0], cls=replace(CHAT, ttft_s=ttft_s)) == placed


def test_while_itl_slos_are_missed_it_waits_where_both_together_are_more_than_those_that_decode_can_bear() -> None:
    for missed, limit_s, placed in ((0.01, 1.9, None), (0.01, 2.1, 1), (0.002, 1.9, 1)):
        router, (tight,) = fleet(PROMPT_S, missed=missed)
        tight.prefill_limit_s = limit_s * PROMPT_S
        assert goes_to(router) == placed


def test_it_needs_a_place_there_and_batch_instances_and_batch_prompts_are_left_alone() -> None:
    router, (full,) = fleet(PROMPT_S)
    running = Request(2, "m", CHAT, 0.0, 500)
    full.requests[running.id] = running
    assert goes_to(router) == 1
    full.sequences = full.max_batch_size
    assert goes_to(router) is None
    assert goes_to(fleet(PROMPT_S, role="batch")[0]) is None
    assert goes_to(fleet(PROMPT_S)[0], cls=JOBS) is None
