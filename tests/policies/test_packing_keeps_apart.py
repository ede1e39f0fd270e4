"""Dispatch beside tight ITL SLOs: batch prompts by what steps have left, and instances that are left to batch work."""

from __future__ import annotations

from math import inf

import pytest

from chiron.control.learning import Learner
from chiron.core.compiled import build
from chiron.core.types import Instance, InstanceKind, Request, RequestClass, Role
from chiron.policies.routers.packing import PackingRouter, PackingSettings

KIND = InstanceKind(name="a", gpu="a100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=256)
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.05)
JOBS = RequestClass(name="jobs", kind="batch")
PREFILL_S = 6e-5
"""A token, as a learner that has seen nothing takes it to be."""


def run(instance: Instance, *, cls: RequestClass = CHAT, prefill_s: float = 0.0) -> None:
    """Something runs there."""
    request = Request(len(instance.requests) + 1000 * instance.id, "m", cls, 0.0, 10)
    request.prefill_cost_s = prefill_s
    instance.requests[request.id] = request
    instance.prefill_backlog_s += prefill_s
    if cls.interactive:
        instance.running_interactive += 1
    else:
        instance.batch[request.id] = request
        instance.prefill_batch_s += prefill_s


def fleet(*roles: Role, step_s: float = 0.03, limit_s: float = 0.3) -> tuple[PackingRouter, list[Instance]]:
    learner = Learner((CHAT, JOBS))
    learner.ttft_min_s = CHAT.ttft_s
    router = PackingRouter(PackingSettings(), learner, evicts=True, keeps_apart=True, passes_long=True)
    instances = [Instance(n, "m", KIND, role, 0.0) for n, role in enumerate(roles, 1)]
    for instance in instances:
        instance.state = "ready"
        if instance.role != "batch":
            instance.prefill_step_s, instance.prefill_limit_s = step_s, limit_s
        router.add(instance)
    return router, instances


def chat(tokens: int = 500) -> Request:
    return Request(1, "m", CHAT, 0.0, tokens)


def job(tokens: int) -> Request:
    return Request(2, "m", JOBS, 0.0, tokens)


WAITED_S = 0.5 * CHAT.ttft_s


def place(router: PackingRouter, request: Request, waited_s: float = 0.0) -> Instance | None:
    placement = router.place(request, waited_s)
    return None if placement is None else placement.instance


def changed(router: PackingRouter, *instances: Instance) -> None:
    for instance in instances:
        router.changed(instance)


def test_a_batch_prompt_longer_than_a_step_has_room_for_goes_in_alone_and_then_others_wait() -> None:
    router, (one,) = fleet("mixed")
    run(one)
    changed(router, one)
    assert place(router, job(2000)) is one, "0.12 s of prefill within 0.3"
    assert place(router, job(8000)) is None
    assert router.room_tokens == 5000
    one.batch_paced = True
    changed(router, one)
    assert place(router, job(2000)) is None
    assert router.room_tokens in (499, 500)
    assert place(router, job(400)) is one, "what a step has room for delays nobody beyond the mean"


def test_what_waits_for_prefill_counts_against_a_batch_prompt() -> None:
    router, (one,) = fleet("mixed")
    run(one, prefill_s=0.02)
    changed(router, one)
    assert place(router, job(300)) is None
    assert place(router, job(100)) is one


def test_a_long_batch_prompt_goes_where_no_interactive_request_runs() -> None:
    router, instances = fleet("mixed", "mixed", "mixed")
    run(instances[0])
    run(instances[2])
    changed(router, *instances)
    assert place(router, job(20_000)) is instances[1]


def test_an_instance_with_batch_work_of_its_own_is_left_alone_until_a_request_has_waited() -> None:
    router, (one, own) = fleet("mixed", "batch")
    run(one, prefill_s=0.4)
    run(own, cls=JOBS)
    changed(router, one, own)
    assert place(router, chat()) is None
    assert place(router, chat(), WAITED_S) is own


def test_an_empty_one_is_not_left_alone() -> None:
    router, (one, own) = fleet("mixed", "batch")
    run(one, prefill_s=0.4)
    changed(router, one, own)
    assert place(router, chat()) is own


def test_after_a_wait_batch_prompts_make_way() -> None:
    router, (one, own) = fleet("mixed", "batch")
    run(one, prefill_s=0.4)
    run(own, cls=JOBS, prefill_s=1.5)
    changed(router, one, own)
    assert place(router, chat()) is None
    placement = router.place(chat(), WAITED_S)
    assert placement is not None
    assert placement.instance is own
    assert placement.evict == tuple(own.batch.values())


def test_batch_work_that_decodes_does_not_make_way_for_want_of_prefill() -> None:
    router, (one, own) = fleet("mixed", "batch")
    run(one, prefill_s=0.4)
    run(own, cls=JOBS)
    run(own, cls=JOBS, prefill_s=1.5)
    changed(router, one, own)
    placement = router.place(chat(), WAITED_S)
    assert placement is not None
    assert [victim.prefill_cost_s for victim in placement.evict] == [1.5]


def test_without_itl_slos_nothing_of_this_holds() -> None:
    router, (one, own) = fleet("mixed", "batch", step_s=inf, limit_s=inf)
    run(one, prefill_s=0.6)
    run(own, cls=JOBS)
    changed(router, one, own)
    assert place(router, chat()) is own
    assert place(router, job(50_000)) is own


@pytest.mark.skipif(build() == "compiled", reason="a method of a compiled class cannot be counted")
def test_a_refusal_looks_at_few_of_many_instances() -> None:
    router, instances = fleet(*["mixed"] * 200)
    for instance in instances:
        run(instance, prefill_s=0.01)
    changed(router, *instances)
    assert place(router, job(2000)) is None
    looked = []
    room = router._room_batch
    router._room_batch = lambda instance: looked.append(instance) or room(instance)  # type: ignore[method-assign, func-returns-value]
    assert place(router, job(2000)) is None
    assert place(router, job(200)) is not None
    assert len(looked) <= 4


def test_before_the_first_interactive_request_batch_prefill_is_bounded_by_the_ttft_that_is_configured() -> None:
    router, (one,) = fleet("mixed", step_s=inf, limit_s=inf)
    router._estimates.ttft_min_s = inf
    run(one, cls=JOBS, prefill_s=0.24 * CHAT.ttft_s)
    changed(router, one)
    assert place(router, job(100)) is one
    run(one, cls=JOBS, prefill_s=0.02 * CHAT.ttft_s)
    changed(router, one)
    assert place(router, job(100)) is None, "the first one to come waits for the step that is under way"
    alone, (own,) = fleet("batch", step_s=inf, limit_s=inf)
    run(own, cls=JOBS, prefill_s=0.26 * CHAT.ttft_s)
    changed(alone, own)
    assert place(alone, job(100)) is own, "an instance for batch work alone takes its two seconds"
