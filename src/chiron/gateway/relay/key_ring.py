"""All API keys and their limits, which each request is held against. Compiled, unlike ``keys``: what configuration is
read into cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from chiron.gateway.relay.errors import forbidden, too_many, unauthenticated
from chiron.gateway.relay.keys import ADMIN, ANONYMOUS, Key, hash_secret
from chiron.gateway.relay.token_bucket import KeyLimits


class KeyRing:
    """All keys, and how much of its limits each has left.

    Without keys everybody is ``ANONYMOUS`` and any secret is accepted, since clients insist on sending one. Without
    an admin key either, ``admin_open`` says whether the admin's routes are open to everybody, as they may be on
    loopback. Who has given out keys has said who may ask: then only the admin key opens them, wherever a request seems
    to come from, since behind a proxy on the same machine they all come from there.
    """

    def __init__(self, keys: Sequence[Key] = (), admin_hash: str = "", *, admin_open: bool = False) -> None:
        self._keys: dict[str, Key] = {}
        self._limits: dict[str, KeyLimits] = {}
        names: set[str] = set()
        for key in keys:
            if not key.name or key.name == ADMIN or key.name in names:
                raise ValueError(f"key name {key.name!r}: must be unique, not empty and not {ADMIN!r}")
            if not key.hash:
                raise ValueError(f"key {key.name!r}: hash is missing; `chiron key` makes one")
            if key.hash in self._keys:
                raise ValueError(f"keys {self._keys[key.hash].name!r} and {key.name!r} have the same hash")
            names.add(key.name)
            self._keys[key.hash] = key
            if key.requests_per_minute < inf or key.tokens_per_minute < inf:
                self._limits[key.name] = KeyLimits(key.requests_per_minute, key.tokens_per_minute)
        self._by_name = {key.name: key for key in keys}
        self.open = not keys
        self.admin_open = admin_open and not admin_hash and not keys
        self.admin = Key(name=ADMIN, hash=admin_hash, admin=True)
        if admin_hash in self._keys:
            raise ValueError(f"key {self._keys[admin_hash].name!r} has the admin key's hash")

    def check(self, authorization: bytes | None) -> Key:
        """The key in an ``Authorization`` header. Raises ApiError 401."""
        if self.open and not (authorization and self.admin.hash):
            return ANONYMOUS
        secret = _bearer(authorization)
        if secret is not None:
            hash = hash_secret(secret)
            if self.admin.hash and hash == self.admin.hash:
                return self.admin
            key = self._keys.get(hash)
            if key is not None:
                return key
        if self.open:
            return ANONYMOUS
        if secret is None:
            raise unauthenticated("No API key. Send the header 'Authorization: Bearer YOUR_KEY'.")
        raise unauthenticated("Incorrect API key.")

    def named(self, name: str) -> Key | None:
        """The key that owns batches under this name; None if it is no longer configured."""
        if name in ("", ADMIN):
            return self.admin if name else ANONYMOUS
        return self._by_name.get(name)

    def check_admin(self, authorization: bytes | None) -> Key:
        """The admin's key. Raises ApiError 401, or 403 for a key that is not the admin's."""
        if self.admin_open:
            return self.admin
        if not self.admin.hash:
            raise forbidden("No admin key is configured; set admin_key_hash in the server's config.")
        secret = _bearer(authorization)
        if secret is None:
            raise unauthenticated("No API key. Send the header 'Authorization: Bearer ADMIN_KEY'.")
        hash = hash_secret(secret)
        if hash == self.admin.hash:
            return self.admin
        if hash in self._keys:
            raise forbidden(f"API key {self._keys[hash].name!r} is not the admin key.")
        raise unauthenticated("Incorrect API key.")

    def take(self, key: Key, now_s: float, tokens: int = 0) -> None:
        """Count one request with ``tokens`` prompt tokens. Raises ApiError 429, and then counts nothing.

        ``now_s`` is any clock that does not go back. A request larger than a minute's worth of tokens waits for a
        full minute and goes into debt, instead of being refused for ever.
        """
        limits = self._limits.get(key.name)
        if limits is None:
            return
        wait_s = limits.take(now_s, tokens)
        if wait_s > 0.0:
            limit = (
                f"{key.requests_per_minute:g} requests per minute"
                if limits.requests.wait_s(now_s, 1.0) > 0.0
                else f"{key.tokens_per_minute:g} tokens per minute"
            )
            raise too_many(f"Rate limit of API key {key.name!r} reached: {limit}. Try again in {wait_s:.1f} s.", wait_s)

    def limited(self, key: Key) -> bool:
        return key.name in self._limits

    def take_spare(self, key: Key, now_s: float, tokens: int) -> bool:
        """Count one request of a batch, with ``tokens`` prompt tokens, if it leaves half a minute's worth of each limit
        to the key's other requests, which cannot wait as it can. False, and then counts nothing: it must wait."""
        limits = self._limits.get(key.name)
        return limits is None or limits.take_spare(now_s, tokens)

    def count(self, key: Key, now_s: float, tokens: int) -> None:
        """Count one request that has been taken already, however little is left."""
        limits = self._limits.get(key.name)
        if limits is not None:
            limits.count(now_s, tokens)

    def bound_debts(self) -> None:
        """After ``count`` of what came over an unknown time: it is owed for a minute at the most."""
        for limits in self._limits.values():
            limits.bound_debts()

    def give_back(self, key: Key, tokens: int) -> None:
        """One that was counted never ran."""
        limits = self._limits.get(key.name)
        if limits is not None:
            limits.give_back(tokens)

    def charge(self, key: Key, tokens: int) -> None:
        """Count output tokens, once they are known."""
        limits = self._limits.get(key.name)
        if limits is not None:
            limits.charge(tokens)


def _bearer(authorization: bytes | None) -> bytes | None:
    if authorization is None:
        return None
    scheme, _, secret = authorization.strip().partition(b" ")
    secret = secret.strip()
    return secret if scheme.lower() == b"bearer" and secret else None
