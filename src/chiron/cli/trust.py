"""``--cacert``: whom to trust in HTTPS."""

from __future__ import annotations

import ssl
from pathlib import Path

from chiron.config.read import ConfigError


def trusting(cacert: Path | None) -> ssl.SSLContext:
    """Trusts the system's authorities, or the one given. Raises ConfigError if it cannot be read."""
    try:
        return ssl.create_default_context(cafile=cacert)
    except ssl.SSLError:
        raise ConfigError(f"--cacert {cacert}: holds no certificate in PEM form") from None
    except OSError as error:
        raise ConfigError(f"--cacert {cacert}: {error.strerror or error}") from None


def trust_hint(error: BaseException) -> str:
    """What helps, after the reason; empty if it is not a matter of trust."""
    return "; --cacert FILE names the one to trust" if isinstance(error, ssl.SSLCertVerificationError) else ""


def checked(cacert: Path | None) -> Path | None:
    """The same file, once it has been read."""
    if cacert is not None:
        trusting(cacert)
    return cacert
