"""Fast-forward is exact: it leaves, bit by bit, what simulating every engine step leaves."""

from __future__ import annotations

from hypothesis import given, settings

from chiron.sim.setup import Setup
from effort import examples
from scenario_factory import everything, run, setups


@given(setups())
@settings(
    max_examples=examples(200),
)
def test_random_scenarios_leave_the_same_log_times_and_decisions_in_both_modes(setup: Setup) -> None:
    fast, slow = everything(run(setup)), everything(run(setup, step_mode=True))
    for part, text in fast.items():
        assert text == slow[part], part
