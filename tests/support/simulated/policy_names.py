"""Which policies a test over all of them runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from chiron.policies.registry import POLICIES

TUNED_TOO = ("chiron-paper-tuned", "hpa-kv-tuned", "hpa-queue-tuned", "llumnix-tuned")
WITHOUT = set() if find_spec("torch") else {"forecast-lstm"}
"""Policies whose library is not here."""
ALL_CODE = sorted(
    name for name in POLICIES if (not name.endswith("-tuned") or name in TUNED_TOO) and name not in WITHOUT
)
"""Every policy as published, and some with tuned settings, which run the same code."""
QUICK = {
    "aibrix-optimizer", "autellix", "chiron", "chiron-paper", "dynamo-batch", "hpa-queue", "knative-kpa", "llumnix",
    "niyama", "qlm", "ray-serve", "sageserve", "slos-serve", "static", "wva-queueing",
}  # fmt: skip
"""At least one of each kind of code; the others' runs are slow tests."""


def every(*more: str) -> list[Any]:
    """``ALL_CODE`` and more, for a test over each of them: in ``make test`` the quick ones."""
    assert set(ALL_CODE) >= QUICK
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL_CODE] + list(more)
