"""Without API keys a web page of another site, open in a browser on this machine, can do nothing with the gateway."""

from __future__ import annotations

import asyncio
from http.client import HTTPConnection
from pathlib import Path

import pytest

from chiron.config.read import ConfigError
from chiron.config.serve import parse_serve
from chiron.gateway.relay.keys import hash_secret
from chiron.gateway.service import Service
from chiron.net.client import Origin
from chiron.net.server import Incoming, serve

BODY = b'{"model": "m", "prompt": "hi"}'


def engine(incoming: Incoming) -> None:
    incoming.respond(200, b'{"choices": []}')


def post(url: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


async def statuses(directory: Path, config: str, headers: dict[str, str], server: str = "") -> list[int]:
    """Of a completion, and of an admin's request."""
    upstream = await serve(engine)
    url = f"http://127.0.0.1:{upstream.port}"
    text = f'{config}\n[models.m]\nengine = "openai"\nendpoints = ["{url}"]\n[server]\nport = 0\n{server}\n'
    service = Service(parse_serve(text, directory=directory, file="chiron.toml"))
    client = Origin(await service.start())
    try:
        async with asyncio.timeout(60):
            while (await client.fetch("GET", "/ready")).status != 200:
                await asyncio.sleep(0.02)
            paths = {"/v1/completions": BODY, "/chiron/drain": b""}
        return [await asyncio.to_thread(post, service.url, path, body, headers) for path, body in paths.items()]
    finally:
        await client.close()
        await service.stop(0.0)
        await upstream.close(0.0)


@pytest.mark.parametrize(
    ("site", "expected"), [("cross-site", [403, 403]), ("same-origin", [200, 202]), ("none", [200, 202])]
)
def test_a_gateway_without_keys_asks_where_a_page_is_from(tmp_path: Path, site: str, expected: list[int]) -> None:
    assert asyncio.run(statuses(tmp_path, "", {"sec-fetch-site": site})) == expected


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "evil.example", "10.evil.example:8000", "localhost.evil.example."]
)
def test_a_name_that_was_pointed_at_this_machine_is_refused(tmp_path: Path, host: str) -> None:
    assert asyncio.run(statuses(tmp_path, "", {"host": host})) == [403, 403]
    keyed = f'keys = [{{ name = "a", hash = "{hash_secret(b"secret")}" }}]'
    assert asyncio.run(statuses(tmp_path, keyed, {"host": host, "authorization": "Bearer secret"})) == [200, 403]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost", "LOCALHOST:80", "[::1]:8000", "[::1]", "llm:80", "host.docker.internal:8000",
     "a.localhost", "192.168.0.7", "llm.example.org:443", "llm.example.org."],
)  # fmt: skip
def test_names_of_this_machine_are_fine(tmp_path: Path, host: str) -> None:
    assert asyncio.run(statuses(tmp_path, "", {"host": host}, 'hosts = ["LLM.example.org"]')) == [200, 202]


def test_a_host_with_a_port_is_no_name(tmp_path: Path) -> None:
    text = '[models.m]\nengine = "emulated"\nprofile = "llama3-8b"\n[server]\nhosts = ["llm.example.org:80"]\n'
    with pytest.raises(ConfigError, match=r"hosts is 'llm.example.org:80'; it must be names without scheme and port"):
        parse_serve(text, directory=tmp_path, file="chiron.toml")


def test_admin_routes_that_no_key_protects_are_not_for_foreign_pages(tmp_path: Path) -> None:
    config = f'keys = [{{ name = "a", hash = "{hash_secret(b"secret")}" }}]'
    key = {"authorization": "Bearer secret"}
    assert asyncio.run(statuses(tmp_path, config, key | {"sec-fetch-site": "cross-site"})) == [200, 403]


def test_with_a_key_a_page_may_be_from_anywhere(tmp_path: Path) -> None:
    config = f'admin_key_hash = "{hash_secret(b"root")}"\nkeys = [{{ name = "a", hash = "{hash_secret(b"secret")}" }}]'
    headers = {"sec-fetch-site": "cross-site", "authorization": "Bearer secret"}
    assert asyncio.run(statuses(tmp_path, config, headers)) == [200, 403]


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://evil.example", [403, 403]),
        ("http://192.168.0.7", [403, 403]),
        ("http://printer", [403, 403]),
        ("http://127.0.0.1.evil.example:8000", [403, 403]),
        ("null", [403, 403]),
        ("http://localhost:3000", [200, 202]),
        ("http://[::1]:3000", [200, 202]),
        ("http://127.0.0.1:8000", [200, 202]),
        ("https://llm.example.org", [200, 202]),
    ],
)
def test_an_older_browser_says_where_a_page_is_from_by_its_origin(
    tmp_path: Path, origin: str, expected: list[int]
) -> None:
    assert asyncio.run(statuses(tmp_path, "", {"origin": origin}, 'hosts = ["llm.example.org"]')) == expected


def test_a_page_of_the_name_that_is_asked_is_fine_on_any_port(tmp_path: Path) -> None:
    headers = {"origin": "http://192.168.0.7:3000", "host": "192.168.0.7:8000"}
    assert asyncio.run(statuses(tmp_path, "", headers)) == [200, 202]
    with_a_key = {"origin": "https://evil.example", "authorization": "Bearer secret"}
    config = f'keys = [{{ name = "a", hash = "{hash_secret(b"secret")}" }}]'
    assert asyncio.run(statuses(tmp_path, config, with_a_key)) == [200, 403]
