"""Why a connection failed, in words for an operator. Without the extras: every command may use it."""

from __future__ import annotations

import ssl

NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
"""What OpenSSL says, by version, of a server that answers in plain HTTP."""


def reason_of(error: BaseException) -> str:
    """Such as ``Connection refused``: without numbers of the system and lines of OpenSSL's source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and error.reason in NO_TLS:
        return "the server does not speak TLS at this port; try http://"
    return str(getattr(error, "strerror", None) or error)
