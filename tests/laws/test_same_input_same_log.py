"""Law 3, and the part of law 10 that needs no gateway: the log depends on the input alone.

Not on the process, its hash seed, or how the clock is driven. That the gateway's clock writes the same log too will
be tested beside that clock.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

from chiron.core.clock import VirtualClock
from chiron.sim.setup import Setup
from effort import examples
from scenario_factory import everything, run, setups

PROGRAM = """
import sys
from scenario_factory import example_setup, everything, run
for policy in sys.argv[1:]:
    for part, text in everything(run(example_setup(policy))).items():
        print(policy, part, text)
"""


def output(hash_seed: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "chiron", "static", "wild"],
        cwd=Path(__file__).parents[1] / "support" / "simulated",
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.slow
def test_two_processes_write_identical_bytes() -> None:
    one, other = output("1"), output("271828")
    assert one.count(b"\n") > 500
    assert one == other


class SlicedClock(VirtualClock):
    """Goes everywhere in small pieces, most of them empty."""

    def run_until(self, end_s: float) -> None:
        start_s = self.now_s
        for part in (0.1, 0.25, 0.5, 0.77):
            super().run_until(start_s + part * (end_s - start_s))
        super().run_until(end_s)

    def step(self) -> bool:
        next_s = self.next_s()
        if next_s is not None and (middle_s := self.now_s + 0.5 * (next_s - self.now_s)) < next_s:
            super().run_until(middle_s)
        return super().step()


@given(setups())
@settings(
    max_examples=examples(50),
)
def test_a_clock_driven_in_slices_writes_the_same_log(setup: Setup) -> None:
    whole, sliced = everything(run(setup)), everything(run(setup, clock=SlicedClock()))
    for part, text in whole.items():
        assert text == sliced[part], part


@given(setups())
@settings(
    max_examples=examples(30),
)
def test_running_twice_in_one_process_writes_the_same_log(setup: Setup) -> None:
    assert everything(run(setup)) == everything(run(setup))
