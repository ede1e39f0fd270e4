"""How laws are tried everywhere: on a machine that may be busy, with the same examples in every run."""

from __future__ import annotations

import gc

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from hypothesis.internal.conjecture import providers

from effort import all_examples, examples

settings.register_profile(
    "chiron",
    max_examples=examples(100),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("chiron")
if not all_examples():
    # Numbers and words in the source of whatever happens to be imported: other examples with each other selection of
    # tests, and 3 s in every process to find them. With all examples they are tried too.
    assert hasattr(providers, "_get_local_constants")
    providers._get_local_constants = lambda: providers._local_constants


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is tried with more examples in the slow part."""
    for item in items:
        test = getattr(item, "obj", None)
        if is_hypothesis_test(test) or item.name == "runTest":
            item.add_marker("examples")


def pytest_collection() -> None:
    """Nothing that collecting makes is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What the collection of tests has made stays: no collection of garbage need look at it again, as those that
    gateways and loads begin with would, for a quarter of a second each."""
    gc.enable()
    gc.collect()
    gc.freeze()
