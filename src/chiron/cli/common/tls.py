"""HTTPS: which certificates to trust (``--cacert``), and whether a server's own files are valid."""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from chiron.config.read import ConfigError

if TYPE_CHECKING:
    from chiron.gateway.settings import GatewaysSettings


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


def gateways_trouble(settings: GatewaysSettings) -> tuple[str, str]:
    """What is wrong with the files of one of several gateways, else "", and until when its certificate is valid. A
    handshake in memory with itself proves that they fit one another, the authority and the address, and are valid."""
    from chiron.fleet.kubernetes.access import AccessError, find_access
    from chiron.gateway.peers.wires import RELAY, client_context, server_context

    for key in ("certificate", "key", "ca"):
        path = getattr(settings, key)
        if not os.access(path, os.R_OK):
            return f"gateways.{key}: {path}: missing or not readable", ""
    if settings.elect == "kubernetes":
        try:
            find_access(os.environ, settings.kubeconfig, settings.kubernetes_context)
        except AccessError as error:
            return f"gateways.elect = 'kubernetes': {error}", ""
    host = settings.address[0]
    try:
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context(settings, RELAY).wrap_bio(back, there, server_hostname=host)
        server = server_context(settings).wrap_bio(there, back, server_side=True)
        for _ in range(4):
            for end in (client, server):
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        return "", str((client.getpeercert() or {}).get("notAfter", ""))
    except (ssl.SSLError, ValueError, OSError) as error:
        what = f"gateways.certificate, gateways.key, gateways.ca: they do not fit, for {host} (gateways.advertise)"
        return f"{what}: {getattr(error, 'verify_message', '') or error}", ""


def checked(cacert: Path | None) -> Path | None:
    """The same file, once it has been read."""
    if cacert is not None:
        trusting(cacert)
    return cacert
