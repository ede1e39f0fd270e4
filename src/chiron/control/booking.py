"""What a request takes on its instance, booked at its dispatch and freed at its end: counters, never recounted.

A request holds its place from dispatch until the engine lets go of it. An evicted one gives its place up at once: the
engine takes it out at the same step boundary at which it lets the next one in.
"""

from __future__ import annotations

from chiron.control.model import ModelState
from chiron.core.types import Instance, Placement, Request
from chiron.policies.size import prefill_left_s


def book(request: Request, placement: Placement) -> None:
    """It runs there from now on. The caller informs the router."""
    instance, cost_s, kv_tokens = placement.instance, placement.prefill_s, placement.kv_tokens
    request.instance = instance
    request.epoch += 1
    if request.kv_saved_tokens and request.kv_saved_on != instance.id:
        request.kv_saved_tokens = 0
    instance.requests[request.id] = request
    request.booked = True
    name = request.class_name
    counts = instance.class_counts
    counts[name] = counts.get(name, 0) + 1
    instance.sequences += request.sequences
    request.reserved_tokens = kv_tokens
    instance.kv_reserved_tokens += kv_tokens
    request.prefill_cost_s = cost_s
    instance.prefill_backlog_s += cost_s
    if request.interactive:
        instance.running_interactive += 1
    else:
        instance.batch[request.id] = request
        instance.batch_sequences += request.sequences
        instance.prefill_batch_s += cost_s


def held_by(request: Request) -> Instance | None:
    """The instance whose engine has it, also one that has been asked to let go of it. None: nobody has it, and what is
    told of it as of one that runs comes too late."""
    instance = request.instance
    if instance is None:
        return None
    return instance if request.booked or request.id in instance.evicting else None


def leave(state: ModelState, request: Request) -> Instance | None:
    """Give up the request's place, if it still has one. Returns where it ran."""
    instance = request.instance
    if instance is None or not request.booked:
        return instance
    request.booked = False
    del instance.requests[request.id]
    instance.class_counts[request.class_name] -= 1
    instance.sequences -= request.sequences
    instance.kv_reserved_tokens -= request.reserved_tokens
    if request.prefill_cost_s:
        prefill_over(instance, request)
    if request.interactive:
        instance.running_interactive -= 1
    else:
        del instance.batch[request.id]
        instance.batch_sequences -= request.sequences
    state.router.changed(instance)
    return instance


def prefill_over(instance: Instance, request: Request) -> None:
    instance.prefill_backlog_s = prefill_left_s(instance.prefill_backlog_s, request.prefill_cost_s)
    if not request.interactive:
        instance.prefill_batch_s = prefill_left_s(instance.prefill_batch_s, request.prefill_cost_s)
    request.prefill_cost_s = 0.0
