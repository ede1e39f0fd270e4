"""The checks of ``chiron doctor``: each looks at one thing and says what it found and what to do next.

They use the standard library only, so that a doctor can say what is not installed.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import socket
import ssl
import stat
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chiron.cli.common.extras import EXTRAS, OPTIONAL, install_hint, missing
from chiron.cli.common.tls import certificate_trouble, gateways_trouble
from chiron.store.damage import NAME, read_notes
from chiron.store.directory import open_to_others
from chiron.store.sqlite.lost import FOLDER

if TYPE_CHECKING:
    from chiron.gateway.settings import ServeConfig
    from chiron.store.lease import Held

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHON_MIN = (3, 11)
MEMORY_MIN_BYTES = 1 << 30
FREE_MIN_BYTES = 1 << 30
"""Below this the data directory is as good as full."""
FREE_COMFORT_BYTES = 10 << 30
FSYNC_SLOW_S = 0.05
"""Every batch commit waits for one; above this the store is slow, and the disk probably a network's."""
FSYNC_TRIES = 5
CLOCK_WARN_S = 30.0
"""A difference between the clocks of a store's server and this machine that is worth a word."""
YEAR_MIN = 2025
"""A clock that shows less was never set; deadlines of batches are wall-clock times."""
RUNNING = "a Chiron is running"
PROBE_S = 2.0
PROBE_MAX_BYTES = 1 << 18
EXPIRY_WARN_S = 14 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor."""

    what: str
    state: Literal["ok", "warn", "fail"]
    found: str
    next: str = ""
    """What to do about it; empty if it is fine."""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def check(what: str, found: str, state: str = OK, next: str = "") -> Check:
    return Check(what=what, state=state, found=found, next=next)  # type: ignore[arg-type]


def machine_checks() -> Iterator[Check]:
    """Python, cores, memory, clock: nothing that depends on a config."""
    found = f"{platform.python_version()} ({sys.executable})"
    yield (
        check("python", found)
        if sys.version_info >= PYTHON_MIN
        else check("python", found, FAIL, f"install Python {'.'.join(map(str, PYTHON_MIN))} or newer")
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{cores} for this process"
    yield check("cores", found) if cores > 1 else check("cores", found, WARN, "gateway and engines will share one core")
    yield _memory()
    year = time.gmtime().tm_year
    found = time.strftime("%Y-%m-%d %H:%M:%S %Z") + f", steps of {time.get_clock_info('monotonic').resolution:.0e} s"
    yield check("clock", found) if year >= YEAR_MIN else check("clock", found, FAIL, "set the clock (NTP)")


def extra_checks(needed: list[str]) -> Iterator[Check]:
    """Every extra: installed, needed and not installed, or not needed."""
    for extra in EXTRAS:
        lacking = missing(extra)
        if lacking and extra in needed:
            yield check(f"extra {extra}", f"not installed: {', '.join(lacking)}", FAIL, install_hint(extra))
        elif lacking:
            yield check(f"extra {extra}", "not installed, not needed here")
        else:
            yield check(f"extra {extra}", ", ".join(_versions(extra)))


def file_limit_check(connections_max: int, wanted: int) -> Check:
    """Open files, which bound the connections."""
    try:
        import resource
    except ModuleNotFoundError:
        return check("open files", "no such limit here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return check("open files", f"{soft:,} now, {_limit(hard)} possible; chiron raises it by itself")
    return check(
        "open files",
        f"{hard:,} at most; {wanted:,} are wanted for limits.connections_max = {connections_max:,}",
        WARN,
        f"raise the hard limit (ulimit -Hn, LimitNOFILE=), or set limits.connections_max = {max(1, hard // 3)}",
    )


def port_check(config: ServeConfig) -> Check:
    """Whether the gateway can listen where it is told to, or a Chiron does so already."""
    server = config.server
    what = f"port {server.port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and chiron_listens(str(address[0]), server.port, tls=server.tls):
            return check(what, f"{RUNNING} on {server.host}; a second one beside it needs another port (--port)")
        hint = "another program listens there; stop it, or choose another with --port or server.port"
        return check(what, f"{server.host}: {error.strerror or error}", FAIL, hint)
    return check(what, f"free on {server.host}")


def chiron_listens(host: str, port: int, *, tls: bool) -> bool:
    """Whether it is a Chiron that answers there: its description of the API needs no key."""
    until_s = time.monotonic() + PROBE_S
    nearest = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    told = b""
    try:
        with socket.create_connection((nearest, port), timeout=PROBE_S) as plain, _secured(plain, tls) as connection:
            request = f"GET /openapi.json HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            while len(told) < PROBE_MAX_BYTES and time.monotonic() < until_s:
                piece = connection.recv(65_536)
                if not piece:
                    break
                told += piece
    except OSError:
        return False
    return told.startswith(b"HTTP/1.1 200 ") and re.search(rb'"title":\s*"Chiron"', told) is not None


def _secured(connection: socket.socket, tls: bool) -> socket.socket:
    """With TLS if the config says so. Nothing secret is sent, so any certificate will do."""
    if not tls:
        return connection
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)


def data_checks(config: ServeConfig) -> Iterator[Check]:
    """Whether batches can be kept: writable, room, and how long a durable write takes."""
    directory = config.data
    nearest = _nearest(directory)
    found = str(directory) + ("" if nearest == directory else " (is made at the start)")
    if not nearest.is_dir():
        yield check("data directory", f"{nearest} is no directory", FAIL, "set server.data to another directory")
        return
    try:
        fsync_s = _fsync_s(nearest)
    except OSError as error:
        hint = "make it writable for this user, or set server.data to another directory"
        yield check("data directory", f"{nearest}: {error.strerror or error}", FAIL, hint)
        return
    yield check("data directory", f"{found}, writable")
    if directory.is_dir():
        yield _privacy(directory)
        yield from _damage(directory)
    free = shutil.disk_usage(nearest).free
    state = FAIL if free < FREE_MIN_BYTES else WARN if free < FREE_COMFORT_BYTES else OK
    hint = "" if state == OK else "make room; a batch of 700,000 small requests takes some 3 GB"
    yield check("disk", f"{free / 1e9:.1f} GB free", state, hint)
    found = f"{fsync_s * 1e3:.1f} ms per durable write"
    slow = fsync_s > FSYNC_SLOW_S
    hint = "batches will be slow; use a local disk for server.data" if slow else ""
    yield check("fsync", found, WARN if slow else OK, hint)


def store_checks(config: ServeConfig) -> Iterator[Check]:
    """Whether a store that is a server can be used; one in the data directory is looked at with that."""
    from chiron.store.port import StoreError
    from chiron.store.postgres.settings import PostgresSettings

    settings = config.store
    if not isinstance(settings, PostgresSettings) or missing("postgres"):
        return  # That the extra is missing is told with the extras.
    from chiron.store.postgres.look import look

    try:
        seen = look(settings)
    except StoreError as error:
        yield check("store", str(error), FAIL, "see [store] in docs/config.md; batches are not served without it")
        return
    found = f"{seen.at}: PostgreSQL {seen.server}, {'TLS' if seen.encrypted else 'not encrypted'}"
    yield check("store", f"{found}, {seen.round_trip_s * 1e3:.1f} ms per round trip, {seen.size_bytes / 1e9:.1f} GB")
    if seen.schema > seen.schema_known:
        hint = "run a newer Chiron, or choose another store.schema"
        yield check("store's tables", f"version {seen.schema}; this Chiron reads {seen.schema_known}", FAIL, hint)
    elif seen.schema == 0 and not seen.may_create:
        hint = f"create the schema {settings.schema} for this user, or grant it CREATE on the database"
        yield check("store's tables", "not there yet, and this user may not make them", FAIL, hint)
    else:
        yield check("store's tables", f"version {seen.schema}" if seen.schema else "are made at the start")
    if seen.holders:
        yield check("gateways on the store", f"{', '.join(seen.holders)} now")
    if config.gateways is not None and config.gateways.elect == "postgres":
        yield _leader(seen.leader)
    if abs(seen.clock_ahead_s) > CLOCK_WARN_S:
        found = f"{abs(seen.clock_ahead_s):.0f} s {'ahead of' if seen.clock_ahead_s > 0 else 'behind'} this machine's"
        yield check("store's clock", found, WARN, "set both clocks (NTP)")
    if settings.file_bytes_max < config.batch.file_max_bytes:
        found = f"{settings.file_bytes_max:,} bytes (store.file_bytes_max)"
        yield check("largest upload", found)


def _privacy(directory: Path) -> Check:
    """Prompts and answers lie in it."""
    found = sum(1 for _ in open_to_others(directory))
    if not found:
        return check("data directory's mode", "not accessible to other users")
    hint = "the next start restricts it, or: " + f"chmod -R go= {directory}"
    return check("data directory's mode", f"{found} files or folders are accessible to other users", WARN, hint)


def _damage(directory: Path) -> Iterator[Check]:
    """What starts and readers have found, and what was put aside because of it."""
    notes = read_notes(directory)
    if notes:
        last = notes[-1]
        found = f"{len(notes)} reports of damage; the last, {last['at']}: {last['what']}"
        hint = f"check the disk; {directory / NAME} has them all; remove it once they are dealt with"
        yield check("damage", found, WARN, hint)
    else:
        yield check("damage", "none was found")
    if any((directory / FOLDER).glob("*")):
        hint = "look through it and remove what you do not need; Chiron never does"
        yield check("lost+found", f"{directory / FOLDER} is not empty", WARN, hint)


def log_checks(config: ServeConfig) -> Iterator[Check]:
    """Whether the event log can be written where it is not in the data directory."""
    path = config.event_log
    if path is None or config.data in path.parents:
        return
    nearest = _nearest(path)
    needed = os.W_OK if nearest.is_file() else os.W_OK | os.X_OK
    if nearest == path and not path.is_file():
        trouble = "is no file"
    elif nearest != path and not nearest.is_dir():
        trouble = f"cannot be made: {nearest} is no directory"
    elif not os.access(nearest, needed):
        trouble = "cannot be written by this user"
    else:
        yield check("event log", str(path) + ("" if nearest == path else " (is made at the start)"))
        return
    hint = 'set telemetry.event_log to another file, or to "off"'
    yield check("event log", f"{path} {trouble}", FAIL, hint)


def security_checks(config: ServeConfig) -> Iterator[Check]:
    """Who can use the models, and whether TLS would work."""
    server = config.server
    if config.keys:
        admin = "and an admin key" if config.admin_key_hash else "no admin key, so the admin routes are closed"
        yield check("API keys", f"{len(config.keys)}, stored as hashes; {admin}")
    elif server.loopback:
        yield check("API keys", "none; only this machine can reach the port")
    else:
        hint = "add [[keys]] (chiron key), unless a proxy in front of Chiron authenticates clients"
        yield check("API keys", f"none, and {server.host} can be reached from other machines", WARN, hint)
    if server.tls:
        yield from _tls(server.tls_cert, server.tls_key)
    elif not server.loopback:
        hint = "set server.tls_cert and tls_key, unless a proxy in front of Chiron terminates TLS"
        yield check("TLS", "off, and keys would cross the network in clear text", WARN, hint)


def gateways_checks(config: ServeConfig) -> Iterator[Check]:
    """Whether the others would let this gateway in, and it them."""
    settings = config.gateways
    if settings is None:
        return
    host, port = settings.address
    found = f"{settings.name}, told to others as {host}:{port}"
    trouble, until = gateways_trouble(settings)
    if trouble:
        yield check("gateways", trouble, FAIL, "docs/gateways.md has the commands that make them")
        return
    left_s = ssl.cert_time_to_seconds(until) - time.time()
    found += f"; certificate valid until {until}"
    yield check("gateways", found) if left_s >= EXPIRY_WARN_S else check("gateways", found, WARN, "renew it soon")
    if read_by_others(os.stat(settings.key), user=os.geteuid(), groups={os.getegid(), *os.getgroups()}):
        yield check(
            "gateways' key file", f"{settings.key} can be read by other users", WARN, f"chmod 600 {settings.key}"
        )


def _leader(held: Held | None) -> Check:
    from chiron.gateway.peers.leadership import Peer

    peer = Peer.of(held.holder) if held is not None else None
    if held is None or peer is None:
        hint = "before the first start of a gateway that is so; else see the gateways' logs"
        return check("leading gateway", "nobody leads now", WARN, hint)
    return check("leading gateway", f"{peer.name}, at {peer.host}:{peer.port}, term {held.token}")


def process_checks(config: ServeConfig) -> Iterator[Check]:
    """Whether the programs of engines exist."""
    from chiron.fleet.process.fleet import ProcessSource

    for model in config.models:
        for kind in model.kinds:
            source = kind.source
            if not isinstance(source, ProcessSource):
                continue
            program = source.command[0]
            place = shutil.which(program, path=source.env.get("PATH"))
            what = f"engine {kind.kind.name}"
            if place is None:
                hint = "install it, or give the program's full path in command"
                yield check(what, f"{program}: not found on PATH", FAIL, hint)
            else:
                yield check(what, place)
            if source.gpus and not config.devices:
                hint = 'set devices = ["0", ...] so that each engine gets GPUs of its own'
                yield check(f"GPUs of {kind.kind.name}", "every process sees all of them", WARN, hint)


def _nearest(path: Path) -> Path:
    """What there is of it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _limit(value: int) -> str:
    return "no limit" if value < 0 or value >= 1 << 62 else f"{value:,}"


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return check("memory", "unknown on this system")
    found = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free"
    if total < MEMORY_MIN_BYTES:
        return check("memory", found, WARN, "the gateway takes up to 1 GB beside the engines")
    return check("memory", found)


def _versions(extra: str) -> Iterator[str]:
    for module in EXTRAS[extra]:
        name = module.replace("_", "-")
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} not installed (faster with it)" if module in OPTIONAL else name


def _fsync_s(directory: Path) -> float:
    """Median time of a small write that is on the disk when it returns."""
    times = []
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".chiron-doctor-") as file:
        for _ in range(FSYNC_TRIES):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return sorted(times)[FSYNC_TRIES // 2]


def read_by_others(found: os.stat_result, *, user: int, groups: Collection[int]) -> bool:
    """Whether others may read a file that is for this user. A Secret in a pod is not this user's own, and can be read
    by the pod's group alone (``fsGroup``)."""
    by_group_only = found.st_uid != user and found.st_gid in groups
    return bool(stat.S_IMODE(found.st_mode) & (0o004 if by_group_only else 0o044))


def _tls(certificate: str, key: str) -> Iterator[Check]:
    if trouble := certificate_trouble(certificate, key):
        found, hint = trouble
        yield check("TLS", found, FAIL, hint)
        return
    if read_by_others(os.stat(key), user=os.geteuid(), groups={os.getegid(), *os.getgroups()}):
        yield check("TLS key file", f"{key} can be read by other users", WARN, f"chmod 600 {key}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    yield _expiry(context, certificate)


def _expiry(server: ssl.SSLContext, certificate: str) -> Check:
    """A handshake in memory with a client that trusts just this certificate: proves both files and shows the dates."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        client.load_verify_locations(certificate)
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)]
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        peer = ends[0].getpeercert() or {}
        until = str(peer.get("notAfter", ""))
        left_s = ssl.cert_time_to_seconds(until) - time.time()
    except (ssl.SSLError, ValueError) as error:
        return check("TLS", f"a handshake with these files fails: {error}", FAIL, "renew the certificate")
    if left_s < EXPIRY_WARN_S:
        return check("TLS", f"certificate is valid until {until}", WARN, "renew it soon")
    return check("TLS", f"certificate and key match, valid until {until}")
