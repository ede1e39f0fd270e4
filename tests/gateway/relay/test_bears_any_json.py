"""Whatever JSON a client sends, wherever the API takes some: an answer below 500, and one that costs little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from chiron.gateway.batch.lines import line_check
from chiron.gateway.relay.errors import SHOWN_MAX, shown
from chiron.gateway.relay.keys import ANONYMOUS
from chiron.store.port import LineError
from gateway_site import ApiSite, models
from scripted_engine import ScriptedEngine, before

ODD = {
    "nested lists": "[" * 990 + "]" * 990,
    "nested objects": '{"a":' * 990 + "1" + "}" * 990,
    "nested too deep to read": "[" * 100_000 + "]" * 100_000,
    "a long number": "9" * 5000,
    "a large integer": "18446744073709551615",
    "a larger integer": "18446744073709551616",
    "a negative integer": "-9223372036854775809",
    "not a number": "NaN",
    "infinity": "Infinity",
    "beyond floats": "1e999",
    "half a character": '"\\ud800"',
    "the other half": '"\\udfff"',
    "half a character and more": '"\\ud800x"',
    "nul": '"\\u0000"',
    "a long text": json.dumps("x" * 100_000),
    "a list of many": "[" + ",".join(["{}"] * 10_000) + "]",
    "true": "true",
    "null": "null",
    "empty": '""',
}
BATCH: dict[str, Any] = {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"}
EXTRA = ("metadata", "output_expires_after", "unknown")
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
FIELDS = ("model", "messages", "stream", "stream_options", "max_tokens", "n", "service_tier", "tools", "unknown")


def bodies(template: dict[str, Any], fields: tuple[str, ...], value: str) -> Iterator[tuple[str, bytes]]:
    """The template with each field in turn replaced by, and then holding, the value as it is written."""
    for field in fields:
        for written in (value, f"[{value}]", f'{{"a": {value}}}'):
            rest = "".join(f", {json.dumps(k)}: {json.dumps(v)}" for k, v in template.items() if k != field)
            yield field, f"{{{json.dumps(field)}: {written}{rest}}}".encode()
    yield "the body", value.encode()
    yield "a name", f"{{{value if value.startswith(chr(34)) else json.dumps(value[:2000])}: 1}}".encode()


def test_the_batch_api_answers_any_json(tmp_path: Path) -> None:
    with ApiSite(tmp_path) as site, closing(HTTPConnection(site.url.removeprefix("http://"), timeout=60)) as api:
        for name, value in ODD.items():
            for field, body in bodies(BATCH, (*BATCH, *EXTRA), value):
                api.request("POST", "/v1/batches", body)
                with api.getresponse() as answer:
                    said = answer.read()
                    assert 400 <= answer.status < 500, (name, field, said)


def test_completions_answer_any_json(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine(lambda incoming: incoming.respond(200, b'{"choices": []}'))
        model = 'served_model_name = "another"'
        async with before(tmp_path, engine, model=model) as (_, client):
            for name, value in ODD.items():
                for field, body in bodies(CHAT, FIELDS, value):
                    answer = await client.fetch("POST", "/v1/chat/completions", body=body)
                    assert answer.status < 500, (name, field, answer.body)

    asyncio.run(main())


def test_lines_of_a_batch_may_hold_any_json() -> None:
    check = line_check("/v1/chat/completions", {"m": models().by_name["m"].settings}, ANONYMOUS)
    line: dict[str, Any] = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    for value in ODD.values():
        for _, text in bodies(line, (*line, "unknown"), value):
            found = check(text)
            assert not isinstance(found, LineError) or len(found.message) < 500
        for _, text in bodies(CHAT, FIELDS, value):
            rest = json.dumps({k: v for k, v in line.items() if k != "body"})[1:].encode()
            check(b'{"body": ' + text + b", " + rest)


def test_what_is_shown_of_a_value_is_short() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x" * 10_000_000, list(range(1_000_000)), {str(i): i for i in range(100_000)}):
        assert len(shown(value)) <= SHOWN_MAX
    while deep:  # Unwound here: as garbage it would be one call in another, a hundred thousand deep.
        deep = deep.pop()
