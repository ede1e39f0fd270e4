"""What another test left in this process is not what a fleet leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from child_processes import KEPT, children


@pytest.fixture(autouse=True)
def only_own_children() -> Iterator[None]:
    before = {child.pid for child in children()}
    KEPT.update(before)
    yield
    KEPT.difference_update(before)
