"""``chiron doctor`` for endpoints: do they answer, serve the model, stream, and have metrics that we can read?"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from chiron.cli.doctor.checks import FAIL, OK, WARN, Check, check
from chiron.engines.claims import model_names
from chiron.engines.metrics import read_row
from chiron.engines.rows import ENGINES, EngineRow
from chiron.fleet.endpoints import EndpointsSource
from chiron.gateway.settings import KindSettings, ServeConfig
from chiron.net.reasons import reason_of

TIMEOUT_S = 10.0
STREAM_TIMEOUT_S = 60.0
"""A busy engine may take a while for its first token."""
ANSWER_MAX_BYTES = 8 << 20
NAMES_SHOWN = 20
"""Of the models that an engine lists."""
WANTED = ("running", "waiting", "generation_tokens")
"""Figures without which the control plane sees less than it should."""


def endpoint_checks(config: ServeConfig) -> Iterator[Check]:
    """Every endpoint of every model."""
    for model in config.models:
        for kind in model.kinds:
            for url in kind.source.urls if isinstance(kind.source, EndpointsSource) else ():
                yield from _one(url, kind, kind.served_model_name or model.name)


def _one(url: str, kind: KindSettings, model: str) -> Iterator[Check]:
    row = ENGINES[kind.engine]
    what = f"endpoint {url}"
    try:
        status, _ = _fetch(url, "GET", row.health_path, kind)
    except (OSError, http.client.HTTPException) as error:
        yield check(what, f"cannot connect: {reason_of(error)}", FAIL, "start the engine, or correct its URL")
        return
    if status != 200:
        hint = f"is it a {kind.engine} engine? engine = 'openai' needs no {row.health_path}"
        yield check(what, f"GET {row.health_path} answers {status}", FAIL, _unauthorized(status) or hint)
        return
    try:
        yield _models(url, kind, model, row)
        yield _metrics(url, kind, row)
        yield _stream(url, kind, model)
    except (OSError, http.client.HTTPException) as error:
        hint = "look at the engine's log"
        yield check(what, f"the connection was lost: {error or type(error).__name__}", FAIL, hint)


def _models(url: str, kind: KindSettings, model: str, row: EngineRow) -> Check:
    what = f"endpoint {url}: models"
    status, body = _fetch(url, "GET", "/v1/models", kind)
    try:
        names = model_names(json.loads(body))
    except (ValueError, RecursionError):
        names = None
    if names is None:
        hint = _unauthorized(status) or "is it an OpenAI server?"
        return check(what, f"GET /v1/models answers {status}, no list of models", FAIL if status != 200 else WARN, hint)
    if model in names:
        return check(what, model)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    shown = (", ".join(names[:NAMES_SHOWN]) or "none") + more
    if not row.minds_model_name:
        return check(what, f"{shown}; {row.name} answers to {model!r} too")
    return check(what, f"it does not know {model!r}; it has: {shown}", FAIL, "set served_model_name to one of these")


def _metrics(url: str, kind: KindSettings, row: EngineRow) -> Check:
    what = f"endpoint {url}: metrics"
    if not row.metrics_path:
        return check(what, f"engine = {row.name!r} has none; Chiron uses its own measurements")
    status, body = _fetch(url, "GET", row.metrics_path, kind)
    if status != 200:
        hint = "switch the engine's metrics on" + (f": {row.metrics_hint}" if row.metrics_hint else "")
        return check(what, f"GET {row.metrics_path} answers {status}", WARN, hint)
    found = read_row(row, body.decode(errors="replace"))
    lacking = [name for name in WANTED if name not in found]
    if lacking:
        hint = f"is it a {kind.engine} engine, of a version that Chiron knows?"
        return check(what, f"not recognised: {', '.join(lacking)}", WARN, hint)
    return check(what, f"{len(found)} figures recognised")


def _stream(url: str, kind: KindSettings, model: str) -> Check:
    """One short completion, streamed: two tokens of the engine's time."""
    what = f"endpoint {url}: streaming"
    body = {"model": model, "prompt": "Hello", "max_tokens": 2, "stream": True}
    path = "/v1/completions"
    status, first_s, events, said = _events(url, path, body, kind)
    if status in (404, 405, 501):
        path = "/v1/chat/completions"
        chat: dict[str, Any] = {key: value for key, value in body.items() if key != "prompt"}
        status, first_s, events, said = _events(
            url, path, chat | {"messages": [{"role": "user", "content": "Hello"}]}, kind
        )
    if status != 200:
        return check(
            what, f"POST {path} answers {status}: {said}", FAIL, _unauthorized(status) or "see the engine's log"
        )
    if events == 0:
        return check(what, f"POST {path} with stream = true sends no events", FAIL, "is streaming off in this engine?")
    return check(what, f"first token after {first_s * 1e3:.0f} ms", OK)


def _events(url: str, path: str, body: dict[str, Any], kind: KindSettings) -> tuple[int, float, int, str]:
    """Status, seconds to the first event, events, and what an error said."""
    connection = _connect(url, STREAM_TIMEOUT_S)
    try:
        began = time.perf_counter()
        headers = {"content-type": "application/json", **_authorization(kind)}
        connection.request("POST", path, json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            return answer.status, 0.0, 0, answer.read(300).decode(errors="replace").strip()
        first_s, events, size = 0.0, 0, 0
        while (line := answer.readline(ANSWER_MAX_BYTES)) and size < ANSWER_MAX_BYTES:
            size += len(line)
            if line.startswith(b"data:") and b"[DONE]" not in line:
                events += 1
                first_s = first_s or time.perf_counter() - began
        return answer.status, first_s, events, ""
    finally:
        connection.close()


def _fetch(url: str, method: str, path: str, kind: KindSettings) -> tuple[int, bytes]:
    connection = _connect(url, TIMEOUT_S)
    try:
        connection.request(method, path, headers=_authorization(kind))
        answer = connection.getresponse()
        return answer.status, answer.read(ANSWER_MAX_BYTES)
    finally:
        connection.close()


def _connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)
    return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)


def _authorization(kind: KindSettings) -> dict[str, str]:
    return {"authorization": f"Bearer {kind.api_key}"} if kind.api_key else {}


def _unauthorized(status: int) -> str:
    return "it needs a key: set api_key_file" if status in (401, 403) else ""
