"""One real ``chiron serve`` with API keys for many tests: two models on emulated engines that are quick."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiron.gateway.relay.keys import hash_secret
from fault_site import FaultSite, wait_for

SECRETS = {
    name: f"sk-edge-{name}-0123456789abcdef" for name in ("all", "chat-only", "small-only", "few", "poor", "admin")
}
_KEYS = {
    "all": "",
    "chat-only": 'classes = ["chat"]',
    "small-only": 'models = ["small"]',
    "few": "requests_per_minute = 2",
    "poor": "tokens_per_minute = 100",
}
_MODEL = """
[models.{name}]
engine = "emulated"
profile = "llama-3.1-8b/a100/tp1"
args = {args}
max_instances = 1
"""


def text(*, keys: bool = True, speedup: float = 100.0, args: Sequence[str] = (), extra: str = "") -> str:
    """The serve config; ``args`` are the engines'."""
    values = ["--speedup", str(speedup), "--output-mean", "20", *args]
    found = _MODEL.format(name="big", args=values) + 'aliases = ["gpt-4o"]\n'
    found += _MODEL.format(name="small", args=values)
    found += '[server]\nport = 0\ngrace = "2s"\n[store]\nreserve_bytes = 0\n[telemetry]\nscrape_period = "200ms"\n'
    found += '[classes.chat]\nkind = "interactive"\nttft = "2s"\nitl = "100ms"\n'
    found += '[classes.fast]\nkind = "interactive"\nttft = "500ms"\nitl = "20ms"\n'
    found += '[classes.batch]\nkind = "batch"\ndeadline = "1h"\n'
    if keys:
        found = f'admin_key_hash = "{hash_secret(SECRETS["admin"].encode())}"\n' + found
        for name, more in _KEYS.items():
            found += f'[[keys]]\nname = "{name}"\nhash = "{hash_secret(SECRETS[name].encode())}"\n{more}\n'
    return found + extra


@dataclass(frozen=True)
class Said:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


def ask(
    url: str, data: object = None, *, key: str = "", method: str = "", headers: Mapping[str, str] | None = None
) -> Said:
    """``data``: bytes as they are, anything else as JSON. ``key``: a name in ``SECRETS``, or the secret itself."""
    body = data if isinstance(data, bytes) or data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json", **(headers or {})})
    if method:
        request.method = method
    if key:
        request.add_header("authorization", f"Bearer {SECRETS.get(key, key)}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Said(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Said(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "big", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, **fields}


@contextmanager
def edge_site(directory: Path, **options: Any) -> Iterator[FaultSite]:
    """Running, with an engine of each model ready."""
    with FaultSite(directory, text(**options)) as site:
        wait_for(lambda: ask(site.url + "/ready").status == 200, "both models have an engine")
        yield site
