"""Prompts that wait inside an engine: by key, and without a trace of those that left."""

from __future__ import annotations

from random import Random

from chiron.core.types import Request
from chiron.policies.composers.prompt_queue import SIZE_MIN, PromptQueue
from policy_factory import CHAT


def test_the_head_is_the_least_key_whatever_came_and_went() -> None:
    random, queue = Random(1), PromptQueue()
    requests = [Request(id, "m", CHAT, 0.0, 1) for id in range(50)]
    waiting: dict[int, tuple[float, int, bool]] = {}
    for number in range(2000):
        request = requests[random.randrange(50)]
        if random.random() < 0.3:
            queue.remove(request)
            waiting.pop(request.id, None)
        else:
            key, begun = float(random.randrange(5)), random.random() < 0.2
            queue.add(request, (key,), begun)
            waiting[request.id] = (key, number, begun)
        for only in (False, True):
            among = [id for id, (_, _, begun) in waiting.items() if begun or not only]
            first = min(among, key=lambda id: waiting[id][:2], default=None)
            head = queue.head(only)
            assert (None if head is None else head.id) == first


def test_entries_that_are_over_are_dropped_where_they_never_surface() -> None:
    queue, first = PromptQueue(), Request(1, "m", CHAT, 0.0, 1)
    queue.add(first, (0.0,), False)
    for id in range(2, 1000):
        passing = Request(id, "m", CHAT, 0.0, 1)
        queue.add(passing, (1.0,), False)
        queue.remove(passing)
    assert len(queue._fresh) <= SIZE_MIN + 2
    assert queue.head(False) is first
