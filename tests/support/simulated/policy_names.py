"""Which policies a test over all of them runs."""

from __future__ import annotations

from importlib.util import find_spec

from chiron.policies.registry import POLICIES

TUNED_TOO = ("chiron-paper-tuned", "hpa-kv-tuned", "hpa-queue-tuned", "llumnix-tuned")
WITHOUT = set() if find_spec("torch") else {"forecast-lstm"}
"""Policies whose library is not here."""
ALL_CODE = sorted(
    name for name in POLICIES if (not name.endswith("-tuned") or name in TUNED_TOO) and name not in WITHOUT
)
"""Every policy as published, and some with tuned settings, which run the same code."""
