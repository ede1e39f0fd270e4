"""Where the API server is, and who asks: the service account of a pod, or a kubeconfig."""

from __future__ import annotations

import base64
import binascii
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts the service account of a pod."""
_FILE_MAX_BYTES = 4 * 1024 * 1024


class AccessError(ValueError):
    """There are no usable credentials; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Everything that a client needs to know."""

    url: str
    ssl: ssl.SSLContext | None = field(default=None, repr=False)
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    """Read anew for each request: the token of a service account is replaced every hour."""
    namespace: str = "default"
    """Where nothing else is said."""

    def headers(self) -> dict[str, str]:
        """Raises OSError for a token that cannot be read."""
        token = self.token if self.token_file is None else self.token_file.read_text(encoding="ascii").strip()
        return {"authorization": f"Bearer {token}"} if token else {}


def in_cluster(environ: Mapping[str, str], account: Path = ACCOUNT) -> Access | None:
    """As a pod has it; None outside a cluster."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    token = account / "token"
    if not host or not token.is_file():
        return None
    try:
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        namespace = (account / "namespace").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise AccessError(f"{account}: the service account cannot be read: {error}") from None
    name = f"[{host}]" if ":" in host else host
    return Access(url=f"https://{name}:{port}", ssl=context, token_file=token, namespace=namespace)


def from_kubeconfig(path: Path, context: str = "") -> Access:
    """The context of this name in a kubeconfig, or its current one. Raises AccessError."""
    config = _load(path)
    name = context or str(config.get("current-context") or "")
    chosen = _named(path, config, "contexts", name, "context")
    cluster = _named(path, config, "clusters", str(chosen.get("cluster")), "cluster")
    user = _named(path, config, "users", str(chosen.get("user")), "user")
    url = cluster.get("server")
    if not isinstance(url, str) or not url.startswith(("https://", "http://")):
        raise AccessError(f"{path}: clusters: server is {url!r}; it must be https://HOST:PORT")
    for key in ("exec", "auth-provider"):
        if key in user:
            raise AccessError(f"{path}: user {chosen.get('user')!r} has {key}; Chiron needs a token or a certificate")
    token_file = user.get("tokenFile")
    return Access(
        url=url,
        ssl=_tls(path, cluster, user) if url.startswith("https://") else None,
        token=str(user.get("token") or ""),
        token_file=(path.parent / str(token_file)) if token_file else None,
        namespace=str(chosen.get("namespace") or "default"),
    )


def find_access(environ: Mapping[str, str], kubeconfig: str = "", context: str = "") -> Access:
    """What the config names, else the pod's own, else ``KUBECONFIG`` or ``~/.kube/config``. Raises AccessError."""
    if not kubeconfig and not context:
        own = in_cluster(environ)
        if own is not None:
            return own
    given = kubeconfig or environ.get("KUBECONFIG", "").split(":")[0] or "~/.kube/config"
    return from_kubeconfig(Path(given).expanduser(), context)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError:
        raise AccessError(f"{path}: reading it needs PyYAML: pip install 'chiron-serving[kubernetes]'") from None
    try:
        text = path.read_bytes()
        if len(text) > _FILE_MAX_BYTES:
            raise AccessError(f"{path}: has {len(text)} bytes; a kubeconfig has at most {_FILE_MAX_BYTES}")
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise AccessError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, Mapping):
        raise AccessError(f"{path}: is no kubeconfig")
    return config


def _named(path: Path, config: Mapping[str, Any], key: str, name: str, inner: str) -> Mapping[str, Any]:
    entries = config.get(key)
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping) and entry.get("name") == name and isinstance(entry.get(inner), Mapping):
            found: Mapping[str, Any] = entry[inner]
            return found
    raise AccessError(f"{path}: {key}: there is no {name!r}")


def _tls(path: Path, cluster: Mapping[str, Any], user: Mapping[str, Any]) -> ssl.SSLContext:
    authority = _data(path, cluster, "certificate-authority")
    try:
        context = ssl.create_default_context(cadata=authority.decode("ascii") if authority else None)
        if cluster.get("insecure-skip-tls-verify") is True:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        certificate, key = _data(path, user, "client-certificate"), _data(path, user, "client-key")
        if certificate and key:
            # OpenSSL's binding reads them from files only.
            with tempfile.NamedTemporaryFile(suffix=".pem") as file:
                file.write(certificate + b"\n" + key)
                file.flush()
                context.load_cert_chain(file.name)
    except (ssl.SSLError, OSError, UnicodeDecodeError) as error:
        raise AccessError(f"{path}: its certificates cannot be used: {error}") from None
    return context


def _data(path: Path, entry: Mapping[str, Any], key: str) -> bytes:
    """What stands in the file itself, or in one that it names; empty: nothing."""
    try:
        if entry.get(f"{key}-data"):
            return base64.b64decode(str(entry[f"{key}-data"]), validate=True)
        return (path.parent / str(entry[key])).read_bytes() if entry.get(key) else b""
    except (binascii.Error, OSError) as error:
        raise AccessError(f"{path}: {key} cannot be read: {error}") from None
