"""A server that runs shows the certificate that its files hold now."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chiron.net.loop import run_on_loop
from chiron.net.renewing import RenewingContext, for_server
from peer_certificates import Authority


async def shown(port: int, name: str | None) -> bytes:
    """The certificate that a client gets to see."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name or "")
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert isinstance(found, bytes)
    return found


@dataclass
class Files:
    """One file, and what becomes of who reads it."""

    path: Path
    fails: OSError | None = None
    reads: int = 0
    now_s: float = 0.0

    def make(self) -> ssl.SSLContext:
        self.reads += 1
        if not self.path.stat().st_mode & 0o400:
            raise PermissionError(13, "it is not ours yet")
        if self.fails is not None:
            raise self.fails
        return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def renewing(self) -> RenewingContext:
        self.path.write_text("old")
        return RenewingContext(self.make, [str(self.path)], lambda: self.now_s)


def test_a_file_that_may_be_read_only_later_is_read_then(tmp_path: Path) -> None:
    files = Files(tmp_path / "tls.key")
    renewing = files.renewing()
    old = renewing.current()
    files.path.write_text("renewed")
    files.path.chmod(0)
    assert renewing.current() is old
    files.path.chmod(0o600)
    assert renewing.current() is not old


def test_one_that_could_not_be_used_is_tried_again_though_it_has_not_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Files(tmp_path / "tls.key")
    renewing = files.renewing()
    old = renewing.current()
    files.path.write_text("renewed")
    files.fails = OSError(24, "too many open files")
    for files.now_s in (0.0, 9.0, 10.0, 19.0):
        assert renewing.current() is old
    assert (files.reads, len(caplog.records)) == (3, 1), "not at each connection, and said once"
    files.fails, files.now_s = None, 20.0
    new = renewing.current()
    assert new is not old
    files.now_s = 1e6
    assert (renewing.current(), files.reads) == (new, 4)


@pytest.mark.parametrize("name", ["gateway.example", None])
@pytest.mark.parametrize("run", [asyncio.run, run_on_loop], ids=["asyncio", "as served"])
def test_also_to_clients_that_name_nobody(
    tmp_path: Path, name: str | None, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    ca = Authority(tmp_path / "ca")
    certificates = [ca.issue(each) for each in ("old", "new")]
    files = (tmp_path / "tls.crt", tmp_path / "tls.key")

    def write(number: int) -> None:
        for source, file in zip(certificates[number], files, strict=True):
            file.with_suffix(".next").write_bytes(source.read_bytes())
            file.with_suffix(".next").replace(file)

    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
        return context

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        context = for_server(RenewingContext(make, [str(file) for file in files]))
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        old = await shown(port, name)
        write(1)
        new = await shown(port, name)
        files[1].unlink()
        lost = await shown(port, name)
        write(0)
        again = await shown(port, name)
        server.close()
        expected = [ssl.PEM_cert_to_DER_cert(certificate.read_text()) for certificate, _ in certificates]
        assert [old, new, lost, again] == [expected[0], expected[1], expected[1], expected[0]]

    write(0)
    run(main())
