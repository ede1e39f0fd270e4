"""What web pages of other sites may not do through a browser on this machine, where no API key protects it.

A page anywhere can send requests to a loopback port. The browser says so (``Sec-Fetch-Site``), unless the page's own
name has been pointed at this machine (DNS rebinding): then the request looks like one from the page to its own server,
and only its ``Host`` tells, which is a name that nobody uses for this machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address

from chiron.gateway.errors import ApiError, forbidden
from chiron.gateway.keys import KeyRing
from chiron.net.server import Incoming

_PORT = re.compile(r":\d*$")
_PRIVATE_ENDS = (".localhost", ".internal")
"""Names that no public name server answers for."""


class ForeignPages:
    """Tells requests of such pages. ``hosts``: names by which the gateway is known; None: those are not checked."""

    def __init__(self, keys: KeyRing, hosts: Collection[str] | None) -> None:
        self._keys = keys
        self._hosts = hosts
        self._known: bytes | None = None
        """The Host header of the last request that was fine: nearly always that of the next."""

    def check(self, incoming: Incoming) -> ApiError | None:
        """Why this request is refused; None: it is not."""
        cross_site = incoming.header(b"sec-fetch-site") == b"cross-site"
        host = incoming.header(b"host")
        if (not cross_site and host == self._known) or not self._unprotected(incoming.path):
            return None
        if cross_site:
            return forbidden("Web pages of other sites may not use what no API key protects.")
        if self._hosts is None or host is None or _is_own(host, self._hosts):
            self._known = host
            return None
        name = host.decode("latin-1")
        return forbidden(
            f"Host {name!r} is no name of this machine, and no API key protects the gateway from web pages that have "
            "such names. Add it to server.hosts, or configure keys."
        )

    def _unprotected(self, path: str) -> bool:
        return self._keys.open or (self._keys.admin_open and not path.startswith("/v1/"))


def _is_own(host: bytes, hosts: Collection[str]) -> bool:
    """``hosts``, addresses, names without a dot, and names that exist on this machine only; with or without a port."""
    name = _PORT.sub("", host.decode("latin-1").lower()).strip("[]").removesuffix(".")
    if name in hosts or "." not in name or name.endswith(_PRIVATE_ENDS):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
