"""Certificates of gateways, and the authority that signs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from chiron.gateway.settings import GatewaysSettings

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Authority:
    """Its files are in ``directory``."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.ca = directory / "ca.pem"
        self._key = directory / "ca.key"
        _openssl("req", "-x509", *_KEY, "-days", "9", "-subj", "/CN=ca", "-keyout", self._key, "-out", self.ca)

    def issue(self, name: str, *, host: str = "IP:127.0.0.1", days: int = 2) -> tuple[Path, Path]:
        """A certificate for this host, and its key; with ``days`` below 0 it has expired."""
        certificate, key, asked = (self.directory / f"{name}.{end}" for end in ("pem", "key", "csr"))
        subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={host}"]
        _openssl("req", *_KEY, *subject, "-keyout", key, "-out", asked)
        signed = ["-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-days", str(days)]
        _openssl("x509", "-req", "-in", asked, *signed, "-copy_extensions", "copy", "-out", certificate)
        return certificate, key

    def settings(self, name: str, *, listen: str = "127.0.0.1:9443", lease_s: float = 3.0) -> GatewaysSettings:
        """Of a gateway with a good certificate."""
        certificate, key = self.issue(name)
        return GatewaysSettings(
            name=name, certificate=str(certificate), key=str(key), ca=str(self.ca), listen=listen, lease_s=lease_s
        )


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
