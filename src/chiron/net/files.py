"""File descriptors of this process: how many there may be, and how many there are."""

from __future__ import annotations

import os
import resource


def files_max() -> int:
    """The limit of this process (``ulimit -n``)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 31) - 1 if soft == resource.RLIM_INFINITY else soft


def files_open() -> int:
    """About how many are open, at no cost: the number that the next one would have, which is the lowest free one."""
    try:
        descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return files_max()
    os.close(descriptor)
    return descriptor
