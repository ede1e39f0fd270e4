"""HTTPS: which certificates to trust (``--cacert``), and whether a server's own files are valid."""

from __future__ import annotations

import os
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


def certificate_trouble(certificate: str, key: str) -> tuple[str, str] | None:
    """What is wrong with a server's two files, and what to do; None if they can be used."""
    for name, path in (("tls_cert", certificate), ("tls_key", key)):
        if not os.access(path, os.R_OK):
            return f"{path}: missing or not readable", f"set server.{name} to a PEM file that this user can read"
    try:
        # Without a password: asking for one would wait for ever in a service.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        hint = "both must be PEM, the key not encrypted, and the key that of the certificate"
        return f"certificate and key do not match: {error}", hint
    return None


def checked(cacert: Path | None) -> Path | None:
    """The same file, once it has been read."""
    if cacert is not None:
        trusting(cacert)
    return cacert
