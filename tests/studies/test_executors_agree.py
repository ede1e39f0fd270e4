"""Whoever simulates: the same outcomes, and a death that costs one trial."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario
from chiron.studies.executors import ExecutorError, InProcess, Workers, local_workers
from chiron.studies.trial import Trial, trial
from study_factory import TRACED


def trials() -> list[Trial]:
    scenario = parse_scenario(TRACED.replace("3m", "40s"), directory=Path())
    return [trial(setup) for setup in setups(scenario, policies=["static", "hpa-queue"], seeds=[1, 2])]


WORKER = """
import os, sys
from chiron.studies import worker
true = worker.done
def done(data):
    line = true(data)
    if line["number"] == 1:
        os.kill(os.getpid(), 9)
    return line
worker.done = done
worker.main()
"""


@pytest.mark.slow
def test_processes_find_what_this_process_finds_and_keys_tell_what_differs() -> None:
    asked = trials()
    here = dict(InProcess().run(asked))
    with closing(local_workers(2)) as workers:
        assert dict(workers.run(asked)) == here
    assert all(outcome.summary is not None for outcome in here.values())
    json.dumps([outcome.summary for outcome in here.values()])
    assert len({each.key for each in asked}) == 4
    assert trial(asked[0].setup).key == asked[0].key == trial(replace(asked[0].setup, label="other")).key
    assert trial(replace(asked[0].setup, scrape_delay_s=0.3)).key != asked[0].key
    past, other = (replace(asked[0].setup.workload, output_tokens=np.full(99_999, n)) for n in (1, 2))
    other.output_tokens[:9], other.output_tokens[-9:] = 1, 1
    keys = {trial(replace(asked[0].setup, history=history)).key for history in (None, past, other)}
    assert len(keys) == 3, "also by what the text of an array leaves out"


@pytest.mark.slow
def test_a_process_that_dies_costs_its_trial_and_another_one_takes_its_place() -> None:
    with closing(Workers([sys.executable, "-c", WORKER], count=1)) as workers:
        ended = dict(workers.run(trials()))
    assert [number for number, outcome in ended.items() if outcome.summary is None] == [1]
    assert ended[1].error == "the process was ended by SIGKILL (out of memory?)"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no cluster there')", "the worker ended with exit status 1: no cluster there"),
        ('print(\'{"fatal": "no NumPy"}\', flush=True); import time; time.sleep(60)', "no NumPy"),
    ],
)
def test_a_worker_that_cannot_begin_ends_the_study_with_the_reason(code: str, message: str) -> None:
    with (
        closing(Workers([sys.executable, "-c", code], count=2)) as workers,
        pytest.raises(ExecutorError, match=message),
    ):
        list(workers.run(trials()))
