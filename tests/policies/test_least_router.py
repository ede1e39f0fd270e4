"""The routers' shared heap against a scan over all instances, and its size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chiron.control.learning import Learner
from chiron.core.types import Instance, InstanceKind, Request, RequestClass
from chiron.policies.routers.least import LeastRouter

KIND = InstanceKind(name="a", gpu="a100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=16_000, max_num_seqs=256)
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0)
REQUEST = Request(1, "llama", CHAT, 0.0, 100)


def router_of(count: int) -> tuple[LeastRouter, list[Instance]]:
    router = LeastRouter(Learner((CHAT,)), lambda instance: instance.kv_reserved_tokens)
    instances = [Instance(i, "llama", KIND, "mixed", 0.0) for i in range(count)]
    for instance in instances:
        router.add(instance)
    return router, instances


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.integers(0, 9), st.sampled_from(["add", "remove"])))))
def test_the_choice_is_that_of_a_scan(steps: list[tuple[int, int | str]]) -> None:
    router, instances = router_of(6)
    open_ids = set(range(6))
    for number, action in steps:
        instance = instances[number]
        if action == "remove" and number in open_ids:
            router.remove(instance)
            open_ids.discard(number)
        elif action == "add" and number not in open_ids:
            router.add(instance)
            open_ids.add(number)
        elif isinstance(action, int):
            instance.kv_reserved_tokens = action
            router.changed(instance)
        scan = min(sorted(open_ids), key=lambda i: instances[i].kv_reserved_tokens, default=None)
        placement = router.place(REQUEST, 0.0)
        assert (placement and placement.instance) is (None if scan is None else instances[scan])


def test_the_heap_does_not_grow_with_the_requests() -> None:
    router, instances = router_of(10)
    for load in range(50_000):  # as when a large job arrives at once: scores only rise
        placement = router.place(REQUEST, 0.0)
        assert placement is not None
        chosen = placement.instance
        assert chosen is instances[load % 10]
        chosen.kv_reserved_tokens += 1
        router.changed(chosen)
    assert len(router._heap) < 200
