"""Trials on a Ray cluster: a real one on this machine (slow), and programs that stand in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario
from chiron.studies.executors import ExecutorError, InProcess, ray_workers
from chiron.studies.trial import Trial, trial
from ray_agent_stub import a_python
from ray_site import PATIENCE, RealRay, needs_ray, real_ray
from study_factory import GENERATED

DIES = """print('{"slots": 4}', flush=True); sys.stdin.buffer.read(16); os._exit(3)"""


def trials() -> list[Trial]:
    scenario = parse_scenario(GENERATED, directory=Path())
    return [trial(setup) for setup in setups(scenario, policies=["static", "chiron"], seeds=[1, 2, 3])]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('no module named ray')", "the worker ended with exit status 1: no module named ray"),
        ('print(\'{"fatal": "--ray x: ConnectionError: no cluster"}\')', "--ray x: ConnectionError: no cluster"),
        (DIES, "the worker ended with exit status 3"),
        ("print('nonsense', flush=True)", "the worker "),
    ],
)
def test_a_cluster_that_cannot_be_used_ends_the_study_with_the_reason(body: str, reason: str, tmp_path: Path) -> None:
    with closing(ray_workers("x", a_python(tmp_path, body))) as workers, pytest.raises(ExecutorError, match=reason):
        list(workers.run(trials()))


def test_a_python_that_is_not_there_is_named() -> None:
    workers = ray_workers("auto", "/nowhere/python")
    with closing(workers), pytest.raises(ExecutorError, match="cannot run '/nowhere/python': No such file"):
        list(workers.run(trials()))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RealRay]:
    with real_ray() as ray:
        ray.add(1)
        yield ray


@pytest.mark.slow
@pytest.mark.alone
@needs_ray
def test_a_cluster_finds_what_this_process_finds(cluster: RealRay, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)
    asked = trials()
    with closing(ray_workers(cluster.address)) as workers:
        assert dict(workers.run(asked)) == dict(InProcess().run(asked))
        assert dict(workers.run(asked[:1])) == dict(InProcess().run(asked[:1])), "and again"
