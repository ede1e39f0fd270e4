"""Which policies a test over all of them runs."""

from __future__ import annotations

from chiron.policies.registry import POLICIES

TUNED_TOO = ("chiron-paper-tuned", "hpa-kv-tuned", "hpa-queue-tuned", "llumnix-tuned")
ALL_CODE = sorted(name for name in POLICIES if not name.endswith("-tuned") or name in TUNED_TOO)
"""Every policy as published, and some with tuned settings, which run the same code."""
