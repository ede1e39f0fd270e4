"""How laws are tried everywhere: on a machine that may be busy, with the same examples in every run."""

from __future__ import annotations

import gc

from hypothesis import HealthCheck, settings

from effort import examples

settings.register_profile(
    "chiron",
    max_examples=examples(100),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("chiron")


def pytest_collection_finish() -> None:
    """What the collection of tests has made stays: no collection of garbage need look at it again, as those that
    gateways and loads begin with would, for a quarter of a second each."""
    gc.collect()
    gc.freeze()
