"""Without API keys a web page of another site, open in a browser on this machine, can do nothing with the gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.config.serve import parse_serve
from chiron.gateway.keys import hash_secret
from chiron.gateway.service import Service
from chiron.net.client import Origin
from chiron.net.server import Incoming, serve

BODY = b'{"model": "m", "prompt": "hi"}'


def engine(incoming: Incoming) -> None:
    incoming.respond(200, b'{"choices": []}')


async def statuses(directory: Path, config: str, headers: dict[str, str]) -> list[int]:
    """Of a completion, and of an admin's request."""
    upstream = await serve(engine)
    url = f"http://127.0.0.1:{upstream.port}"
    text = f'{config}\n[models.m]\nengine = "openai"\nendpoints = ["{url}"]\n[server]\nport = 0\n'
    service = Service(parse_serve(text, directory=directory, file="chiron.toml"))
    client = Origin(await service.start())
    try:
        async with asyncio.timeout(20):
            while (await client.fetch("GET", "/ready")).status != 200:
                await asyncio.sleep(0.02)
            asked = await client.fetch("POST", "/v1/completions", body=BODY, headers=headers)
            drained = await client.fetch("POST", "/chiron/drain", headers=headers)
        return [asked.status, drained.status]
    finally:
        await client.close()
        await service.stop(0.0)
        await upstream.close(0.0)


@pytest.mark.parametrize(
    ("site", "expected"), [("cross-site", [403, 403]), ("same-origin", [200, 202]), ("none", [200, 202])]
)
def test_a_gateway_without_keys_asks_where_a_page_is_from(tmp_path: Path, site: str, expected: list[int]) -> None:
    assert asyncio.run(statuses(tmp_path, "", {"sec-fetch-site": site})) == expected


def test_admin_routes_that_no_key_protects_are_not_for_foreign_pages(tmp_path: Path) -> None:
    config = f'keys = [{{ name = "a", hash = "{hash_secret(b"secret")}" }}]'
    key = {"authorization": "Bearer secret"}
    assert asyncio.run(statuses(tmp_path, config, key | {"sec-fetch-site": "cross-site"})) == [200, 403]


def test_with_a_key_a_page_may_be_from_anywhere(tmp_path: Path) -> None:
    config = f'admin_key_hash = "{hash_secret(b"root")}"\nkeys = [{{ name = "a", hash = "{hash_secret(b"secret")}" }}]'
    headers = {"sec-fetch-site": "cross-site", "authorization": "Bearer secret"}
    assert asyncio.run(statuses(tmp_path, config, headers)) == [200, 403]
