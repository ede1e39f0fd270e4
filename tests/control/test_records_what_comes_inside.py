"""What comes while the control plane is at something else is told at the same depth in a replay; and what an engine's
adapter has left in the requests of an instance that failed is left there again."""

from __future__ import annotations

from typing import Any

import pytest

from chiron.core.types import Instance, ModelSpec, Request, RequestClass
from recorded_plane import Recorded
from scenario_factory import CLASSES, PROFILE, kind_of

CHAT, NIGHT = CLASSES[0], CLASSES[2]
SPEC = ModelSpec(name="m0", kinds=(kind_of(PROFILE, kv_capacity_tokens=1000),), min_instances=0, max_instances=2)
"""Of an answer 200 tokens are expected."""


def submit(recorded: Recorded, number: int, tokens: int, cls: RequestClass = CHAT) -> Request:
    request = Request(number, "m0", cls, recorded.clock.now_s, tokens)
    recorded.inputs.submit(request)
    return request


def two_instances(*requests: tuple[int, RequestClass]) -> tuple[Recorded, Instance]:
    """One has these requests, and will leave, so that nothing is created once it fails. The other has one of 100
    tokens and room for 650: with what is expected of its answer, a request of 450."""
    recorded = Recorded(instances=2, spec=SPEC)
    for number, (tokens, cls) in enumerate(requests, 1):
        recorded.inputs.prefilled(submit(recorded, number, tokens, cls))
    failing = next(instance for instance in recorded.plane.instances.values() if instance.requests)
    assert len(failing.requests) == len(requests)
    recorded.inputs.instance_leaving(failing)
    recorded.inputs.prefilled(submit(recorded, 9, 100))
    return recorded, failing


def told(lines: list[dict[str, Any]], start: str) -> list[str]:
    """Names of inputs and outputs, from the first of that name on, with the request that they are about."""
    names = [f"{line.get('k')} {line['a'][0] if line.get('a') else ''}" for line in lines]
    return names[next(i for i, name in enumerate(names) if name.startswith(start)) :]


def difference(recorded: Recorded) -> str:
    """In a replay; a last input shows what was done too much before."""
    submit(recorded, 8, 10**6)
    return recorded.replayed().difference


def test_what_comes_after_something_inside_is_not_told_inside_that() -> None:
    """An instance fails: its short request moves, its long one waits, and nothing is in the log of that. A short one
    that comes then waits behind it; in the middle of the failure it would have been placed."""
    recorded, failing = two_instances((100, CHAT), (440, CHAT))

    def follow(request: Request) -> None:
        if request.id == 5:
            recorded.inputs.instance_failed(failing)
            submit(recorded, 6, 100)

    recorded.hears = follow
    submit(recorded, 5, 10**6)  # It fits nowhere.

    assert told(recorded.lines, "instance_failed") == [
        f"instance_failed {failing.id}",
        "failed None",
        "dispatch 1",
        "submit 6",
        "arrival 6",
    ]
    assert [line["d"] for line in recorded.lines if line.get("k") in ("instance_failed", "submit")][-3:] == [0, 1, 1]
    assert difference(recorded) == ""


@pytest.mark.parametrize(("tokens_done", "moves"), [(0, True), (200, False)])
def test_what_an_instance_that_failed_had_made_is_known_again(tokens_done: int, *, moves: bool) -> None:
    """With its answer so far the request no longer fits beside the other one."""
    recorded, failing = two_instances((300, NIGHT))
    failing.requests[1].tokens_done = tokens_done
    recorded.inputs.instance_failed(failing)

    assert ("dispatch 1" in told(recorded.lines, "instance_failed")) == moves
    assert difference(recorded) == ""
