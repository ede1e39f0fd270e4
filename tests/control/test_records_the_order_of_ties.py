"""What comes at the very moment at which a timer of the control plane is due is at the same side of it in a replay."""

from __future__ import annotations

import pytest

from chiron.core.types import Request
from recorded_plane import Recorded
from scenario_factory import CLASSES, PROFILE


def test_a_request_that_follows_one_whose_end_is_being_told() -> None:
    """It is submitted from inside, before the control plane has done all that follows from the end."""

    def follow(request: Request) -> None:
        if request.id < 5:
            recorded.inputs.submit(Request(request.id + 1, "m0", CLASSES[0], 1.0, 8 if request.id == 4 else 10**6))

    recorded = Recorded(follow)
    recorded.inputs.submit(Request(1, "m0", CLASSES[0], 1.0, 10**6))  # It fits nowhere, and so do the next.
    recorded.inputs.cancel(Request(99, "m0", CLASSES[0], 1.0, 8))

    recorded.hears = lambda request: recorded.inputs.submit(Request(8, "m0", CLASSES[0], 2.0, 8))
    recorded.clock.run_until(2.0)
    recorded.inputs.instance_ready(recorded.nothing.instance, recorded.nothing)
    recorded.inputs.submit(Request(6, "m0", CLASSES[0], 2.0, 8))
    first = next(iter(recorded.plane.models["m0"].instances[1].requests.values()))
    recorded.inputs.finished(first)

    assert [line["d"] for line in recorded.lines if line.get("k") == "submit"] == [0, 1, 2, 3, 4, 0, 1]
    names = [line.get("k") for line in recorded.lines]
    assert names[names.index("ended", names.index("finished")) :][:4] == ["ended", "submit", "arrival", "dispatch"]
    lines = recorded.lines
    recorded.lines = [line for line in lines if line.get("a") != (99,)]
    assert recorded.replayed().difference == ""
    recorded.lines = lines
    assert "of which the replay knows nothing" in recorded.replayed().difference


@pytest.mark.parametrize("timer_first", [True, False])
def test_an_arrival_beside_a_timer(*, timer_first: bool) -> None:
    recorded = Recorded()
    clock, inputs, nothing, plane = recorded.clock, recorded.inputs, recorded.nothing, recorded.plane

    inputs.submit(Request(1, "m0", CLASSES[0], 1.0, 8))  # An instance is asked for, by a timer of this moment.
    if timer_first:
        assert clock.step()
    inputs.submit(Request(2, "m0", CLASSES[0], 1.0, 8))
    clock.run_until(2.0)
    nothing.instance.began_s = 1.5
    inputs.instance_ready(nothing.instance, nothing)
    inputs.kinds_limited({PROFILE.name: 1})
    inputs.kinds_limited({})
    inputs.kinds_found({PROFILE.name: 1})
    inputs.instance_leaving(nothing.instance)

    names = [line.get("k", line["event"]) for line in recorded.lines]
    assert (names.index("created") < len(names) - 1 - names[::-1].index("arrival")) == timer_first
    done = recorded.replayed()
    assert done.difference == ""
    assert done.placements == names.count("dispatch") > 0
    assert done.learned.models["m0"]["cold_start_s"] == plane.models["m0"].cold_start_s == 0.5
