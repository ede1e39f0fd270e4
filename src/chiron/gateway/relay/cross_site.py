"""What web pages of other sites may not do through a browser on this machine, where no API key protects it.

A page anywhere can send requests to a loopback port. The browser says so, in ``Sec-Fetch-Site`` or, if it is an older
one, by the page's ``Origin``; unless the page's own name has been pointed at this machine (DNS rebinding): then the
request looks like one from the page to its own server, and only its ``Host`` tells, which is a name that no client uses
for this machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address

from chiron.gateway.relay.errors import ApiError, forbidden
from chiron.gateway.relay.key_ring import KeyRing
from chiron.net.server import Incoming

_PORT = re.compile(r":\d*$")
_PRIVATE_ENDS = (".localhost", ".internal")
"""Names that no public name server answers for."""


class CrossSiteGuard:
    """Tells requests of such pages. ``hosts``: names by which the gateway is known; None: those are not checked."""

    def __init__(self, keys: KeyRing, hosts: Collection[str] | None) -> None:
        self._keys = keys
        self._hosts = hosts
        self._known: bytes | None = None
        """The Host header of the last request that was fine: nearly always that of the next."""

    def check(self, incoming: Incoming) -> ApiError | None:
        """Why this request is refused; None: it is not."""
        if not self._keys.open:
            return None
        host = origin = site = None
        for name, value in incoming.headers:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        if site == b"cross-site":
            return forbidden("Web pages of other sites may not use routes that no API key protects.")
        if origin is not None and not self._is_of_this_machine(origin, host):
            shown = origin.decode("latin-1")[:200]
            return forbidden(
                f"Origin {shown!r} is a web page of another site, which may not use routes that no API key protects. "
                "Add its name to server.hosts, or configure keys."
            )
        if host == self._known or self._hosts is None or host is None or _is_own(host, self._hosts):
            self._known = host
            return None
        shown = host.decode("latin-1")[:200]
        return forbidden(
            f"Host {shown!r} is no name of this machine, and no API key protects the gateway from web pages that have "
            "such names. Add it to server.hosts, or configure keys."
        )

    def _is_of_this_machine(self, origin: bytes, host: bytes | None) -> bool:
        """Whether a page of this origin may ask: one of the name that is asked, on any port, or of this machine."""
        name = _name(origin.partition(b"://")[2])
        if not name:
            return False  # "null", as of a page that hides where it is from.
        if (host is not None and name == _name(host)) or name in (self._hosts or ()):
            return True
        return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


def _is_own(host: bytes, hosts: Collection[str]) -> bool:
    """``hosts``, addresses, names without a dot, and names that exist on this machine only; with or without a port."""
    name = _name(host)
    if name in hosts or "." not in name or name.endswith(_PRIVATE_ENDS):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: bytes) -> str:
    """Without its port, as names are compared."""
    return _PORT.sub("", host.decode("latin-1").lower()).strip("[]").removesuffix(".")


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
