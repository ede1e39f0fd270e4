"""Settings of packed dispatch. Not compiled: configuration is read by a class's annotations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingSettings:
    """Limits of one instance's share of work waiting to be prefilled."""

    prefill_share_of_ttft: float = 0.25
    """An interactive request goes where at most this share of its TTFT target of prefill waits before it."""
    batch_prefill_share_of_ttft: float = 0.05
    """Batch work is released to an instance shared with interactive work only while less than this waits there."""
    batch_reserve: float = 0.1
    """Share of the max batch size that batch work leaves free on an instance shared with interactive work."""
    batch_prefill_s: float = 2.0
    """The same limit, in seconds, on an instance of role batch."""
