"""API keys: authentication, permissions and rate limits.

Only SHA-256 hashes are kept. Keys are long and random, so a slow password hash would protect nothing and cost
milliseconds on the path of every request. Looking the hash up in a dict leaks timing about the hash, from which a
key cannot be built.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from hashlib import sha256
from math import inf
from secrets import token_urlsafe

from chiron.gateway.relay.errors import forbidden

ADMIN = "admin"
SECRET_PREFIX = "sk-chiron-"
"""Limits are per minute, and a key that was idle for a minute may spend a minute's worth at once."""

_HASH = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What one API key may do. Empty ``classes`` and ``models`` mean: all of them."""

    name: str
    """Names the key in logs and metrics, and owns its files and batches."""
    hash: str = field(default="", repr=False)
    """``sha256:`` and the hex digest of the secret."""
    classes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    requests_per_minute: float = inf
    tokens_per_minute: float = inf
    """Prompt tokens on arrival, output tokens when they are known; of batch items, when they run."""
    admin: bool = False
    """Sees everything of everybody."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            if not getattr(self, name) > 0:
                raise ValueError(f"key {self.name!r}: {name} is {getattr(self, name)}; it must be above 0")
        if self.hash and not _HASH.fullmatch(self.hash):
            # The value may be the secret itself, put here by mistake.
            raise ValueError(f"key {self.name!r}: hash must be 'sha256:' and 64 hexadecimal digits in lower case")

    @property
    def owner(self) -> str | None:
        """Whose files and batches it sees; None: everybody's."""
        return None if self.admin else self.name

    def permit(self, model: str | None = None, cls: str | None = None) -> None:
        """Raise ApiError 403 if the key is not for this model or request class."""
        if model is not None and self.models and model not in self.models:
            raise forbidden(
                f"API key {self.name!r} may not use model {model!r}. Allowed: {', '.join(self.models)}.", param="model"
            )
        if cls is not None and self.classes and cls not in self.classes:
            raise forbidden(
                f"API key {self.name!r} may not send requests of class {cls!r}. Allowed: {', '.join(self.classes)}."
            )


ANONYMOUS = Key(name="")
"""Everybody, when no keys are configured."""


def hash_secret(secret: bytes) -> str:
    """What the config holds in place of the secret."""
    return "sha256:" + sha256(secret).hexdigest()


def new_secret() -> str:
    """A fresh API key with 256 random bits."""
    return SECRET_PREFIX + token_urlsafe(32)
