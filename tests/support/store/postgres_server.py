"""A PostgreSQL server for tests: on a free port, in a temporary directory, never as root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from child_processes import KEPT
from ports import free_port

USER = "chiron"
PASSWORD = "a password"
WAIT_S = 60.0
FAST = (
    *("fsync=off", "full_page_writes=off", "synchronous_commit=off", "autovacuum=off", "jit=off"),
    *("wal_level=minimal", "max_wal_senders=0", "bgwriter_delay=10s", "wal_writer_delay=10s"),
)
"""What is written is never needed again."""


def binaries() -> Path | None:
    """The newest that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


def why_not() -> str:
    """Why there can be no server; empty if there can."""
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"psycopg cannot be imported: {error}"
    if binaries() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if os.getuid() == 0 and _unprivileged() is None:
        return "this is root, and there is no user 'postgres' or 'nobody' to run PostgreSQL as"
    return ""


def _unprivileged() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


@dataclass
class Server:
    """One cluster. ``stop`` and ``start`` may be called in between."""

    directory: Path
    port: int
    settings: tuple[str, ...] = FAST
    process: subprocess.Popen[bytes] | None = None
    password: str = PASSWORD

    @property
    def url(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        words = [str(_bin("postgres")), "-D", str(self.directory / "data")]
        settings = (f"port={self.port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={self.directory}")
        quiet = ("max_connections=60", "shared_buffers=32MB", "logging_collector=off")
        for setting in (*settings, *quiet, *self.settings):
            words += ["-c", setting]
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, **as_user(), start_new_session=True)  # type: ignore[call-overload]
        KEPT.add(self.process.pid)
        self.wait()

    def use_tls(self, certificate: Path, key: Path) -> None:
        """From the next start on. The server must own its key."""
        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            place = self.directory / name
            shutil.copyfile(source, place)
            place.chmod(0o600)
            if user := as_user():
                os.chown(place, user["user"], user["group"])  # type: ignore[arg-type]
        files = (f"ssl_cert_file={self.directory}/server.crt", f"ssl_key_file={self.directory}/server.key")
        self.settings = (*self.settings, "ssl=on", *files)

    def wait(self) -> None:
        import psycopg

        until_s = time.monotonic() + WAIT_S
        while True:
            try:
                psycopg.connect(self.url, password=PASSWORD, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert self.process is not None
                assert self.process.poll() is None, (self.directory / "log").read_text()
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: well; SIGQUIT: at once; SIGKILL: like a power cut, but for the disk."""
        if self.process is None:
            return
        if how == signal.SIGKILL:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        self.process.wait(timeout=WAIT_S)
        KEPT.discard(self.process.pid)
        self.process = None
        if how == signal.SIGKILL:
            _end_children(self.directory)


def _end_children(directory: Path) -> None:
    """The server's children have sessions of their own and notice only at their next look that it is gone."""
    mark = f"{directory}/data".encode()
    until_s = time.monotonic() + WAIT_S
    while time.monotonic() < until_s:
        left = [path for path in Path("/proc").glob("[0-9]*") if _works_in(path, mark)]
        if not left:
            return
        for path in left:
            try:
                os.kill(int(path.name), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _works_in(process: Path, directory: bytes) -> bool:
    try:
        return os.readlink(process / "cwd").encode() == directory and (process / "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def _bin(name: str) -> Path:
    found = binaries()
    assert found is not None
    return found / name


def as_user() -> dict[str, object]:
    user = _unprivileged() if os.getuid() == 0 else None
    if user is None:
        return {}
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextmanager
def postgres_server(settings: tuple[str, ...] = FAST) -> Iterator[Server]:
    """Started, and gone at the end."""
    directory = Path(tempfile.mkdtemp(prefix="chiron-postgres-", dir="/tmp"))
    try:
        if user := as_user():
            os.chown(directory, user["user"], user["group"])  # type: ignore[arg-type]
        password = directory / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        subprocess.run(
            [
                *(_bin("initdb"), "-D", directory / "data", "-U", USER, "--no-sync", "-A", "scram-sha-256"),
                *("--pwfile", password, "--no-locale", "-E", "UTF8"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            **as_user(),  # type: ignore[call-overload]
        )
        server = Server(directory=directory, port=free_port(), settings=settings)
        try:
            server.start()
            yield server
        finally:
            server.stop(signal.SIGQUIT)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    with postgres_server() as running:
        print(running.url, flush=True)
        sys.stdin.read()
