"""Certificates that are renewed while a process runs: their files are looked at before each connection is secured.

Whoever renews them (cert-manager, an ACME client) writes the files anew and restarts nobody. A look is a ``stat`` of
each file. Files that do not fit one another, as in the middle of a renewal, change nothing: what was read before serves
on.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable, Sequence

log = logging.getLogger("chiron.tls")


class RenewingContext:
    """A context of these files as they are now."""

    def __init__(self, make: Callable[[], ssl.SSLContext], files: Sequence[str]) -> None:
        """``make`` reads them. Raises what it raises: OSError, and ``ssl.SSLError`` is one."""
        self._make = make
        self._files = files
        self._seen = self._look()
        self._context = make()

    def current(self) -> ssl.SSLContext:
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = self._make()
                log.info("%s: read again", self._files[0])
            except OSError as error:
                log.warning("%s: renewed, and cannot be used; the one before it still is: %s", self._files[0], error)
        return self._context

    def _look(self) -> list[tuple[int, int, int]]:
        """Empty where one is missing."""
        try:
            return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, self._files)]
        except OSError:
            return []


def for_server(renewing: RenewingContext) -> ssl.SSLContext:
    """For a listener that keeps one context: each handshake is given the certificate of now."""
    first = renewing.current()

    def choose(wire: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        current = renewing.current()
        if current is not context:
            wire.context = current

    first.sni_callback = choose  # Called without a name, too.
    return first
