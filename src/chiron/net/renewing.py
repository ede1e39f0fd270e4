"""Certificates that are renewed while a process runs: their files are looked at before each connection is secured.

Whoever renews them (cert-manager, an ACME client) writes the files anew and restarts nobody. A look is a ``stat`` of
each file. Files that cannot be used, as in the middle of a renewal, change nothing: what was read before serves on, and
they are tried again a little later, also where a look finds nothing new.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable, Sequence
from math import inf

log = logging.getLogger("chiron.tls")

AGAIN_S = 10.0
"""Files that could not be used are tried again then: it may have been for want of file descriptors."""


class RenewingContext:
    """A context of these files as they are now."""

    def __init__(
        self,
        make: Callable[[], ssl.SSLContext],
        files: Sequence[str],
        time_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``make`` reads them. Raises what it raises: OSError, and ``ssl.SSLError`` is one."""
        self._make = make
        self._files = files
        self._time_s = time_s
        self._again_s = inf
        self._seen = self._look()
        self._context = make()

    def current(self) -> ssl.SSLContext:
        seen = self._look()
        changed = seen != self._seen
        if not changed and self._time_s() < self._again_s:
            return self._context
        self._seen, self._again_s = seen, inf
        try:
            self._context = self._make()
            log.info("%s: read again", self._files[0])
        except OSError as error:
            self._again_s = self._time_s() + AGAIN_S
            words = "%s: renewed, and cannot be used; the one before it still is: %s"
            log.log(logging.WARNING if changed else logging.DEBUG, words, self._files[0], error)
        return self._context

    def _look(self) -> list[tuple[int, ...]]:
        """Empty where one is missing. Also who may read them: that is often set after they are written."""
        try:
            found = [os.stat(file) for file in self._files]
        except OSError:
            return []
        return [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_mode, s.st_uid, s.st_gid) for s in found]


def for_server(renewing: RenewingContext) -> ssl.SSLContext:
    """For a listener that keeps one context: each handshake is given the certificate of now."""
    first = renewing.current()

    def choose(wire: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        current = renewing.current()
        if current is not context:
            wire.context = current

    first.sni_callback = choose  # Called without a name, too.
    return first
