"""A key that others may read is warned of; one that a pod reads by its own group is as it should be."""

from __future__ import annotations

import os

import pytest

from chiron.cli.doctor.checks import read_by_others

US, ROOT, FS_GROUP = 10001, 0, 10001


@pytest.mark.parametrize(
    ("owner", "group", "mode", "warned"),
    [
        (US, 100, 0o600, False),
        (US, 100, 0o400, False),
        (US, 100, 0o640, True),
        (US, FS_GROUP, 0o640, True),  # It can be for its owner alone.
        (US, 100, 0o604, True),
        (ROOT, FS_GROUP, 0o440, False),  # A Secret where the pod has an fsGroup.
        (ROOT, FS_GROUP, 0o444, True),
        (ROOT, 100, 0o444, True),
        (ROOT, 100, 0o440, True),
    ],
)
def test_a_key_is_for_whoever_uses_it(owner: int, group: int, mode: int, warned: bool) -> None:
    found = os.stat_result((0o100000 | mode, 1, 1, 1, owner, group, 100, 0, 0, 0))
    assert read_by_others(found, user=US, groups={FS_GROUP, 5}) == warned
