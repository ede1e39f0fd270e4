"""Which instances a plan means: functions for the hooks ``take_back`` and ``label``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chiron.core.types import Role
from chiron.policies.views import InstanceView


def take_back_fullest(settings: Any, draining: Sequence[InstanceView]) -> int:
    """The one with the most requests left, the older of equals."""
    return max(draining, key=lambda instance: (instance.dispatched, -instance.id)).id


def label_by_rank(settings: Any, counts: Mapping[Role, int]) -> Sequence[Role]:
    """The first instances are those of role interactive, the last those of role batch."""
    return [role for role, count in counts.items() for _ in range(count)]
