"""``chiron serve`` as a process: TLS, and how much memory a client that does not read costs."""

from __future__ import annotations

import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from chiron.engines.metrics import parse_metrics
from edge_site import SECRETS, ask, chat, edge_site, text
from fault_site import FaultSite, wait_for
from net_site import certificate


@pytest.mark.slow
def test_tls_from_end_to_end(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    config = text().replace("[server]\n", f'[server]\ntls_cert = "{cert}"\ntls_key = "{key}"\n')
    trust = ssl.create_default_context(cafile=str(cert))
    with FaultSite(tmp_path, config) as site:
        url = f"https://127.0.0.1:{site.port}"

        def ready() -> bool:
            try:
                with urllib.request.urlopen(url + "/ready", context=trust, timeout=60) as answer:
                    return answer.status == 200
            except urllib.error.HTTPError as error:
                error.close()
                return False

        wait_for(ready, "ready")
        head = {"authorization": f"Bearer {SECRETS['all']}"}
        for stream in (False, True):
            asked = urllib.request.Request(url + "/v1/chat/completions", json.dumps(chat(stream=stream)).encode(), head)
            with urllib.request.urlopen(asked, context=trust, timeout=60) as answer:
                assert answer.status == 200
                assert answer.read()
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            urllib.request.urlopen(url + "/health", context=ssl.create_default_context(), timeout=60)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_ciphers("AES128-SHA")
        with socket.create_connection(("127.0.0.1", site.port)) as raw, pytest.raises(ssl.SSLError):
            old.wrap_socket(raw)
        with socket.create_connection(("127.0.0.1", site.port), timeout=60) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"HTTP/" not in plain.recv(1000)
    assert "Traceback" not in site.log.read_text()


@pytest.mark.slow
def test_clients_that_do_not_read_cost_little_memory(tmp_path: Path) -> None:
    asked = json.dumps(chat(max_tokens=120_000, ignore_eos=True, stream=True)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
    config = '[limits]\nclient_stall = "20s"\n'
    with edge_site(tmp_path, extra=config) as site, ExitStack() as stack:
        assert site.process is not None
        gateway = psutil.Process(site.process.pid)
        assert ask(site.url + "/v1/chat/completions", chat(), key="all").status == 200
        before = gateway.memory_info().rss
        clients = [stack.enter_context(socket.socket()) for _ in range(20)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", site.port))
            client.sendall(head % (SECRETS["all"].encode(), len(asked)) + asked)

        def running() -> float:
            page = ask(site.url + "/metrics", key="admin").body.decode()
            return parse_metrics(page)["chiron_num_requests_running"]

        wait_for(lambda: running() == len(clients), "all of them run")
        most, ends_s = 0, time.monotonic() + 6.0
        while time.monotonic() < ends_s:
            most = max(most, gateway.memory_info().rss)
            time.sleep(0.1)
        assert most - before < 40 << 20
        assert ask(site.url + "/v1/chat/completions", chat(), key="all").status == 200
        wait_for(lambda: running() == 0, "the stalled clients are cut off", 90.0)
