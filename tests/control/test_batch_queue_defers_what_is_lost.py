"""The batch queue: earliest deadline first among what can be met, and shorter prompts past one that finds no room."""

from __future__ import annotations

from math import inf

from chiron.control.queue import BatchQueue, Sizes
from chiron.core.types import Request, RequestClass
from chiron.policies.queues.deadline_groups import DeadlineGroups

JOBS = RequestClass(name="jobs", kind="batch")


def item(number: int, deadline_s: float, tokens: int = 100) -> Request:
    return Request(number, "m", JOBS, 0.0, tokens, deadline_s=deadline_s)


def drained(queue: BatchQueue, now_s: float) -> list[int]:
    order = []
    while (head := queue.head(now_s, 1)) is not None:
        queue.remove_head(head, now_s)
        order.append(head.id)
    return order


def queue_of(*items: Request, defers_late: bool = True) -> BatchQueue:
    queue = BatchQueue(lambda: DeadlineGroups(10.0, (lambda name: 5.0) if defers_late else None), 10.0, Sizes([1000]))
    for one in items:
        queue.add(one, 0.0)
    return queue


def test_what_cannot_be_met_waits_behind_what_can() -> None:
    items = [item(1, 50.0), item(2, 54.0), item(3, 100.0), item(4, 104.9), item(5, 105.0), item(6, 300.0)]
    assert drained(queue_of(*items), 0.0) == [1, 2, 3, 4, 5, 6]
    assert drained(queue_of(*items), 100.0) == [5, 6, 1, 2, 3, 4]
    assert drained(queue_of(*items, defers_late=False), 100.0) == [1, 2, 3, 4, 5, 6]


def test_what_is_lost_gets_every_twentieth_turn() -> None:
    queue = queue_of(*(item(n, 10.0) for n in range(3)), *(item(100 + n, inf) for n in range(50)))
    order = drained(queue, 50.0)
    assert [order.index(n) for n in range(3)] == [20, 41, 52]
    assert (queue.count, list(queue), queue.views({"jobs": 1.0})) == (0, [], ())


def test_a_shorter_prompt_is_found_in_any_of_the_next_groups_and_nothing_is_lost_of_the_count() -> None:
    long = [item(n, 50.0, 5000) for n in range(3)]
    short = item(7, 90.0, 200)
    queue = queue_of(*long, short)
    assert queue.head(0.0, 1) is long[0]
    assert queue.shorter(0.0, 4096, 1) is short
    assert queue.shorter(0.0, 100, 1) is None
    queue.remove_head(short, 0.0)
    assert queue.count == 3
    assert drained(queue, 0.0) == [0, 1, 2]


def test_one_that_ended_while_it_was_late_or_queued_is_counted_no_more() -> None:
    late, ended, last = item(1, 10.0), item(2, 200.0), item(3, 200.0)
    queue = queue_of(late, ended, last)
    assert queue.head(100.0, 1) is ended
    for one in (late, ended):
        one.outcome = "cancelled"
        queue.forget(one)
    assert [r.id for r in queue] == [3]
    assert drained(queue, 100.0) == [3]
    queue.add(item(4, 10.0), 100.0)
    assert drained(queue, 100.0) == [4]


def test_a_group_that_filled_again_is_due_when_what_is_in_it_now_is() -> None:
    first, second = item(1, 11.0), item(2, 15.0)
    queue = queue_of(first)
    queue.remove_head(first, 0.0)
    queue.add(second, 0.0)
    assert [view.deadline_s for view in queue.views({"jobs": 1.0})] == [15.0]
