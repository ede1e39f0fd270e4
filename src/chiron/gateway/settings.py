"""Settings of the gateway, as frozen values. ``config.serve`` reads them from a file.

Durations are seconds, sizes bytes. Every queue, wait and body has a limit here. Hashes and keys stay out of ``repr``,
so that no log of a configuration shows them.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address, ip_network
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.engines.rows import ENGINES
from chiron.fleet.kubernetes.source import NAME
from chiron.net.shares import LOOPBACK
from chiron.policies.cascade import CascadeRule

if TYPE_CHECKING:
    from chiron.fleet.settings import FleetSettings, SleeperSettings
    from chiron.fleet.union import Source
    from chiron.gateway.relay.keys import Key
    from chiron.gateway.relay.uplink.joining import StaySettings
    from chiron.store.postgres.settings import PostgresSettings
    from chiron.store.settings import StoreSettings

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DAY_S = 86_400.0
WORKERS_MAX = 256
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


def _check(fine: bool, key: str, value: object, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{key} is {value!r}; it must be {allowed}")


def _above_zero(settings: Any, *but: str) -> None:
    """Every number of a settings dataclass is finite and above 0, except those named."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and each.name not in but:
            key = each.name.removesuffix("_s")
            _check(isfinite(value) and value > 0, key, value, "above 0, and finite")


def _is_network(text: str) -> bool:
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the gateway listens, and where it keeps what must survive it."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback it needs API keys (or ``open_without_keys``)."""
    port: int = 8000
    """0: any free port, printed at the start."""
    hosts: tuple[str, ...] = ()
    """More names by which clients on this machine ask for it, as behind a proxy that hands on theirs. Only a gateway
    on loopback without keys looks: other names may be those of web pages that were pointed at it (403)."""
    data: str = "chiron-data"
    """Directory of the batch store, the event log and the engines' logs; relative to the config file."""
    tls_cert: str = ""
    """PEM file with the certificate chain; with ``tls_key`` the gateway speaks HTTPS."""
    tls_key: str = ""
    """PEM file with the private key, not encrypted."""
    trusted_proxies: tuple[str, ...] = LOOPBACK
    """Addresses and networks of proxies in front of the gateway: their connections count against no address, and the
    shares of addresses use what they send in ``X-Forwarded-For``."""
    open_without_keys: bool = False
    """Listen beyond loopback although no API key is set: anybody who reaches the port may use the models."""
    workers: int | Literal["auto"] = 1
    """Processes that carry clients' connections and tokens (relays), beside the one that decides; 1: one process does
    all of it. "auto": as many as there are cores, less one."""
    grace_s: float = 30.0
    """At a stop, how long running requests may still take before they are cut."""

    def __post_init__(self) -> None:
        _check(bool(self.host), "host", self.host, "an address or a host name, such as '127.0.0.1' or '0.0.0.0'")
        _check(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        for each in self.hosts:
            _check(
                bool(_NAME.fullmatch(each)), "hosts", each, "names without scheme and port, such as 'llm.example.org'"
            )
        for each in self.trusted_proxies:
            allowed = "addresses or networks, such as '10.0.0.5' or '10.0.0.0/8'"
            _check(_is_network(each), "trusted_proxies", each, allowed)
        fine = self.workers == "auto" or 1 <= self.workers <= WORKERS_MAX
        _check(fine, "workers", self.workers, f"1 to {WORKERS_MAX}, or 'auto'")
        _check(bool(self.data), "data", self.data, "a directory")
        lacking, given = ("tls_key", "tls_cert") if self.tls_cert else ("tls_cert", "tls_key")
        _check(bool(self.tls_cert) == bool(self.tls_key), lacking, "", f"set together with {given}")

    def relays(self, cores: int) -> int:
        """Processes beside the one that decides, on a machine with so many cores; 0: none."""
        workers = cores - 1 if self.workers == "auto" else self.workers
        return workers if workers > 1 else 0

    @property
    def tls(self) -> bool:
        return bool(self.tls_cert)

    @property
    def own_hosts(self) -> frozenset[str] | None:
        """Names to which it answers besides those of any machine; None: to all."""
        return frozenset(map(str.lower, (self.host, *self.hosts))) if self.loopback else None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """Limits on what clients send and on how long anything waits."""

    body_max_bytes: int = 32 * MIB
    """Body of a request, uploads of files apart (413 beyond)."""
    bodies_max_bytes: int = GIB
    """Of all requests that are not answered yet, together (503 beyond): what a burst of long prompts may take."""
    header_max_bytes: int = 64 * KIB
    """Request line and headers together (431 beyond)."""
    headers_max: int = 100
    """Headers of a request (431 beyond)."""
    connections_max: int = 10_000
    """Open client connections; more get a 503 and are closed at once, unless one that is idle or slow gives way."""
    peer_share: float = 0.5
    """Of ``connections_max``, ``bodies_max_bytes``, ``queue_max`` and the uploads under way, what one address or API
    key may take (503; 429 for the queue and uploads)."""
    queue_max: int = 10_000
    """Requests of clients that wait for an instance of one model: interactive ones, and as many of the batch class (429
    beyond)."""
    queue_wait_max_s: float = 300.0
    """How long one may wait there (503 beyond). Must cover a cold start if the fleet scales to zero."""
    outage_wait_s: float = 30.0
    """How long requests wait there for endpoints that have answered before and answer no more. Where none has answered
    since the start, and where start after start of an engine fails, they get a 503 at once."""
    held_notice_s: float = 15.0
    """A stream that has waited there for this long begins (200) with comments that say so, one each 15 seconds; what
    goes wrong after that is an error event in it. 0: it stays silent."""
    request_timeout_s: float = 3600.0
    """From arrival to the last token (504, or the stream is cut with an error event)."""
    engine_stall_s: float = 600.0
    """An engine that sends nothing of a stream for this long loses the request, which is tried elsewhere if nobody has
    seen a part of it. Long prompts may wait for minutes inside an engine, so this is no small number."""
    idle_s: float = 75.0
    """A kept connection without a request is closed after this."""
    header_timeout_s: float = 20.0
    """From a request's first byte to the end of its headers."""
    body_timeout_s: float = 120.0
    """The longest silence inside its body (408 beyond); a body slower than 1 KiB/s is not forgiven more than this in
    all. Uploads of files have bounds of their own."""
    client_stall_s: float = 60.0
    """A client that reads nothing for this long while its answer waits is cut off."""
    retry_after_s: float = 1.0
    """Retry-After where a queue is full, a request waited too long for an instance, or the gateway stops or is not
    ready. Key limits say when they will be over, everything else a second or what it knows."""

    def __post_init__(self) -> None:
        _above_zero(self, "held_notice_s")
        fine = isfinite(self.held_notice_s) and self.held_notice_s >= 0.0
        _check(fine, "held_notice", self.held_notice_s, "0 or more, and finite")
        _check(self.peer_share <= 1.0, "peer_share", self.peer_share, "above 0 and at most 1")
        allowed = f"body_max_bytes ({self.body_max_bytes}) at least"
        _check(self.bodies_max_bytes >= self.body_max_bytes, "bodies_max_bytes", self.bodies_max_bytes, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """Limits of the batch API and of how much of the store is in flight."""

    window_max: int = 512
    """Items of one model taken out of the store at a time: queued or running in the control plane."""
    items_max: int = 1_000_000
    """Lines of one input file."""
    file_max_bytes: int = 8 * GIB
    """One uploaded file (413 beyond)."""
    line_max_bytes: int = 8 * MIB
    """One line of an input file."""
    completion_window_min_s: float = 60.0
    """The shortest ``completion_window`` that is accepted."""
    completion_window_max_s: float = 30 * DAY_S
    """The longest."""
    retention_s: float = 30 * DAY_S
    """Files and ended batches older than this are deleted."""

    def __post_init__(self) -> None:
        _above_zero(self)
        least, most = self.completion_window_min_s, self.completion_window_max_s
        _check(least <= most, "completion_window_min", least, f"at most completion_window_max ({most:g} s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """How often engines are looked at, and where the event log goes."""

    scrape_period_s: float = 1.0
    """Between two looks at an engine's metrics."""
    event_log: str = ""
    """File of the event log (JSON lines); relative to the config file; empty: ``events.jsonl`` in the data
    directory; ``"off"``: none."""
    event_log_grouped: bool = True
    """What happens to requests is written as one line for up to some hundred events, which is smaller and costs less;
    ``chiron explain``, ``advice`` and ``read_event_log`` read both."""
    input_log: str = ""
    """File of the input log, for ``chiron replay``; relative to the config file; empty: none."""
    rotate_bytes: int = 256 * MIB
    """The event log starts a new file at this size."""
    rotate_keep: int = 8
    """Older files of the event log that are kept; the input log has the same."""

    def __post_init__(self) -> None:
        _above_zero(self, "rotate_keep")
        _check(self.rotate_keep >= 0, "rotate_keep", self.rotate_keep, "0 or more")


_OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
PEER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PEER_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,100}):([0-9]{1,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaysSettings:
    """One of several gateways on one PostgreSQL store, of which one leads. They speak TLS with each other."""

    certificate: str
    """PEM file with this gateway's certificate, for the host of ``advertise``: it is shown by both ends."""
    key: str
    """PEM file with its private key, not encrypted."""
    ca: str
    """PEM file with the authority that signs the certificates of all gateways, and of nobody else."""
    name: str = field(default_factory=socket.gethostname)
    """What the others call it; default: the host's name."""
    listen: str = "0.0.0.0:9443"
    """Address and port for the other gateways, while this one leads."""
    advertise: str = ""
    """Host and port where the others reach it; default: ``listen``, or the host's name where that is any address."""
    lease_s: float = 1.5
    """A leader that has not been heard of for so long is followed by another one."""
    elect: Literal["postgres", "kubernetes"] = "postgres"
    """Where the lease is kept that says who leads: in the database of the store, or as a Lease of Kubernetes."""
    kubernetes_lease: str = "chiron"
    """Name of that object."""
    kubernetes_namespace: str = ""
    """Empty: the one that the gateway runs in, or the kubeconfig's."""
    kubeconfig: str = ""
    """A path; empty: the service account of the gateway's pod, else ``KUBECONFIG`` or ``~/.kube/config``."""
    kubernetes_context: str = ""
    """Of the kubeconfig; empty: its current one."""
    settle_s: float = 1.0
    """For so long a new leader waits at most for the relays that the one before it spoke with to tell what runs where.
    Until then it places nothing and leaves the fleet as it is. Those of a machine that is gone never tell."""

    def __post_init__(self) -> None:
        for key in ("certificate", "key", "ca"):
            _check(bool(getattr(self, key)), key, "", "a PEM file")
        allowed = "1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit"
        _check(bool(PEER_NAME.fullmatch(self.name)), "name", self.name, allowed)
        for key, value in (("listen", self.listen), ("advertise", self.advertise or self.listen)):
            found = _PEER_ADDRESS.fullmatch(value)
            fine = found is not None and 1 <= int(found[2]) <= 65535
            _check(fine, key, value, "HOST:PORT, such as '10.0.0.5:9443' or '[fd00::5]:9443'")
        _check(1.0 <= self.lease_s <= 300.0, "lease", self.lease_s, "1 second to 5 minutes")
        _check(self.elect in ("postgres", "kubernetes"), "elect", self.elect, "'postgres' or 'kubernetes'")
        for key in ("kubernetes_lease", "kubernetes_namespace"):
            value = getattr(self, key)
            fine = bool(_OBJECT_NAME.fullmatch(value)) or (not value and key == "kubernetes_namespace")
            _check(fine, key, value, "a Kubernetes name: a-z, 0-9, - and .")
        _check(0.1 <= self.settle_s <= 60.0, "settle", self.settle_s, "0.1 seconds to a minute")

    @property
    def listen_address(self) -> tuple[str, int]:
        return _address(self.listen)

    @property
    def address(self) -> tuple[str, int]:
        """Where the others reach it."""
        host, port = _address(self.advertise or self.listen)
        return (socket.gethostname() if host in ("0.0.0.0", "::") else host), port


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSettings:
    """One kind of instance of a model: what it is to the control plane, and what it comes from."""

    kind: InstanceKind
    engine: str
    """Name of a row in ``engines.rows.ENGINES``."""
    source: Source
    served_model_name: str = ""
    """The model's name inside the engine, put into requests on their way; empty: the model's own name."""
    api_key: str = field(default="", repr=False)
    """Sent to the engines as a bearer token."""
    kv_capacity_known: bool = True
    """False: ``kind.kv_capacity_tokens`` is a guess; believe the engine's metrics if they say."""
    context_tokens: int | None = None
    """Prompt and answer of one request together; None: ask the engine."""
    profile: str = ""
    """Name or path of the profile whose timing the engine has, if it has another's."""

    def __post_init__(self) -> None:
        _check(self.engine in ENGINES, "engine", self.engine, f"one of {', '.join(ENGINES)}")
        told = self.context_tokens
        _check(told is None or told >= 1, "context_tokens", told, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeSettings:
    """What a model is that has no instances: two others, of which the second is asked where the first is unsure."""

    first: str
    """Name of the model that is asked first, the small one."""
    then: str
    """Name of the model that is asked where that one is unsure, or cannot answer."""
    rule: CascadeRule
    first_wait_s: float | None = None
    """For so long a request waits for an instance of the first; then the second is asked. None: half of its TTFT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One served model."""

    name: str
    kinds: tuple[KindSettings, ...]
    """In order of preference."""
    classes: tuple[str, ...]
    """Names of the request classes that it serves."""
    default_class: str
    """Of a request that does not say; interactive."""
    batch_class: str
    """Of batch items and of ``service_tier: flex``; empty: the model takes no batch work."""
    min_instances: int = 1
    max_instances: int = 4
    aliases: tuple[str, ...] = ()
    """Other names that clients may use for it."""
    cascade: CascadeSettings | None = None
    """It has no instances of its own: other models answer for it."""

    def spec(self) -> ModelSpec:
        """What the control plane needs of it."""
        return ModelSpec(
            name=self.name,
            kinds=tuple(each.kind for each in self.kinds),
            min_instances=self.min_instances,
            max_instances=self.max_instances,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesModelsSettings:
    """Where ChironModel resources are."""

    namespace: str = ""
    """Default: the one that Chiron runs in, or the kubeconfig's."""
    kubeconfig: str = ""
    """A file; default: the service account of Chiron's pod, else ``KUBECONFIG`` or ``~/.kube/config``."""
    context: str = ""
    """Of the kubeconfig; default: its current one."""
    max_instances: int = 100
    """The most that ``maxInstances`` of a resource may say, and of one that says nothing."""
    min_instances: int = 16
    """The most that ``minInstances`` of a resource may say: they run whether there are requests or not."""
    weight: float = 10.0
    """The largest weight of a class that a resource brings. It counts beside those of all models."""

    def __post_init__(self) -> None:
        _above_zero(self)
        fine = not self.namespace or bool(NAME.fullmatch(self.namespace))
        _check(fine, "namespace", self.namespace, "a Kubernetes name: a-z, 0-9, - and .")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that a gateway is started with."""

    data: Path
    """Absolute."""
    event_log: Path | None
    """Absolute; None: no event log."""
    input_log: Path | None
    """Absolute; None: no input log."""
    server: ServerSettings
    limits: LimitSettings
    batch: BatchSettings
    telemetry: TelemetrySettings
    store: StoreSettings | PostgresSettings
    fleet: FleetSettings
    sleepers: SleeperSettings
    devices: tuple[str, ...]
    """GPU numbers that are handed out to processes, each to one at a time; empty: it hands out none."""
    gpus: Mapping[str, int]
    """GPUs of each type that exist; a type not named is unlimited."""
    classes: Mapping[str, RequestClass]
    models: tuple[ModelSettings, ...]
    cascades: tuple[ModelSettings, ...] = ()
    """Models that others answer for."""
    policy: str
    """Name in ``policies.registry.POLICIES``."""
    policy_settings: Any
    """That policy's frozen settings dataclass."""
    policy_label: str
    """What the config calls it, which may be a variant's name."""
    stage_policy: str = ""
    """Below it, replicas of the stages of instances that are pipelines; empty: they stay as they begin."""
    stage_settings: Any = None
    """That stage policy's frozen settings dataclass; None: its defaults."""
    relays: StaySettings
    gateways: GatewaysSettings | None = None
    """None: this gateway is the only one."""
    kubernetes: KubernetesModelsSettings | None = None
    """None: models are the file's only."""
    keys: tuple[Key, ...] = field(default=(), repr=False)
    admin_key_hash: str = field(default="", repr=False)
    """``sha256:`` and 64 hexadecimal digits; empty: the admin routes are closed, but on loopback without keys."""
    text: str = field(default="", repr=False)
    """The config file as written, plus the overrides."""
