"""Where API keys exist the admin's routes need the admin key, wherever a request seems to come from; and drains end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key, hash_secret
from scripted_engine import ScriptedEngine, before, body

KEYS = f'[[keys]]\nname = "a"\nhash = "{hash_secret(b"secret")}"\n'
ROUTES = (("GET", "/chiron/status"), ("POST", "/chiron/drain"), ("POST", "/chiron/undrain"), ("GET", "/metrics"))


@pytest.mark.parametrize("secret", ["", "secret"])
def test_with_keys_and_no_admin_key_nobody_is_the_admin_on_loopback_either(tmp_path: Path, secret: str) -> None:
    async def main() -> None:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        async with before(tmp_path, ScriptedEngine(), extra=KEYS) as (_, client):
            for method, path in ROUTES:
                refused = await client.fetch(method, path, headers=headers)
                assert (refused.status, b"admin_key_hash" in refused.body) == (403, True), path
            assert (await client.fetch("GET", "/ready")).status == 200

    asyncio.run(main())


def test_loopback_is_open_to_the_admin_only_without_any_key() -> None:
    assert KeyRing(admin_open=True).admin_open
    assert not KeyRing([Key(name="a", hash=hash_secret(b"secret"))], admin_open=True).admin_open
    assert not KeyRing(admin_hash=hash_secret(b"root"), admin_open=True).admin_open


def test_a_drained_gateway_takes_requests_again(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine(lambda incoming: incoming.respond(200, b'{"choices": []}'))
        async with before(tmp_path, engine) as (service, client):
            assert (await client.fetch("POST", "/chiron/drain")).status == 202
            assert (await client.fetch("GET", "/ready")).status == 503
            assert (await client.fetch("POST", "/v1/chat/completions", body=body())).status == 503
            back = await client.fetch("POST", "/chiron/undrain")
            assert (back.status, back.body) == (200, b'{"status":"ready"}')
            assert (await client.fetch("GET", "/ready")).status == 200
            assert (await client.fetch("POST", "/v1/chat/completions", body=body())).status == 200
            stopping = asyncio.create_task(service.stop(0.0))
            await asyncio.sleep(0)
            assert not service.undrain(), "a stop is not taken back"
            await stopping

    asyncio.run(main())
