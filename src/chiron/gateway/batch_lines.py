"""Lines of batch files: what an input line must hold, and what a result line looks like. Pure functions.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [...]}}
{"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}},
 "error": null}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from chiron.gateway.admission import BYTES_PER_TOKEN, NESTING_MAX, nested_too_deep, prompt_bytes
from chiron.gateway.errors import ApiError, shown
from chiron.gateway.keys import Key
from chiron.gateway.settings import ModelSettings
from chiron.store.port import ItemSpec, LineError, request_id

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
CUSTOM_ID_MAX = 512
"""Characters."""


def line_check(
    endpoint: str, models: Mapping[str, ModelSettings], key: Key | None
) -> Callable[[bytes], ItemSpec | LineError]:
    """The check of one batch's lines. ``models`` by every name that a client may use; ``key`` is its owner's."""

    def check(line: bytes) -> ItemSpec | LineError:
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            return LineError(code="invalid_json_line", message=f"This line is not parseable as valid JSON: {error}.")
        if not isinstance(value, dict):
            return LineError(code="invalid_json_line", message="This line is not a JSON object.")
        if nested_too_deep(line, value):
            return LineError(code="invalid_json_line", message=f"This line is nested deeper than {NESTING_MAX} levels.")
        return _check_frame(value, endpoint) or _check_body(value, endpoint, models, key)

    return check


def _check_frame(value: dict[str, Any], endpoint: str) -> LineError | None:
    """Everything around the body."""
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_MAX:
        return _bad(
            "custom_id",
            f"custom_id is {shown(custom_id)}; it must be a string of 1 to {CUSTOM_ID_MAX} characters.",
        )
    method = value.get("method")
    if method != "POST":
        return _bad("method", f"method is {shown(method)}; it must be 'POST'.", "invalid_method")
    url = value.get("url")
    if url != endpoint:
        return _bad("url", f"url is {shown(url)}; it must be the batch's endpoint, {endpoint!r}.", "invalid_url")
    return None


def _check_body(
    value: dict[str, Any], endpoint: str, models: Mapping[str, ModelSettings], key: Key | None
) -> ItemSpec | LineError:
    body = value.get("body")
    if not isinstance(body, dict):
        return _bad("body", f"body is {shown(body)}; it must be an object, the request to {endpoint}.")
    name = body.get("model")
    model = models.get(name) if isinstance(name, str) else None
    if model is None:
        known = ", ".join(sorted({m.name for m in models.values() if m.batch_class and _may_use(key, m.name)}))
        return _bad("body.model", f"body.model is {shown(name)}; models served here: {known}.", "model_not_found")
    if not model.batch_class:
        return _bad("body.model", f"Model {model.name!r} takes no batch requests.", "model_not_found")
    if key is None:
        return _bad("body.model", "The API key that this batch belongs to no longer exists.", "permission_denied")
    try:
        key.permit(model.name, model.batch_class)
    except ApiError as error:
        return _bad("body.model", error.message, "permission_denied")
    if body.get("stream"):
        return _bad("body.stream", f"body.stream is {shown(body['stream'])}; answers of batches are not streamed.")
    prompt = body.get("messages" if endpoint == ENDPOINTS[0] else "prompt")
    if endpoint == ENDPOINTS[0] and (not isinstance(prompt, list) or not prompt):
        return _bad("body.messages", f"body.messages is {shown(prompt)}; it must be a list that is not empty.")
    if endpoint != ENDPOINTS[0] and (not isinstance(prompt, str | list) or prompt == []):
        return _bad("body.prompt", f"body.prompt is {shown(prompt)}; it must be a text or a list of token ids.")
    for field in ("max_tokens", "max_completion_tokens"):
        limit = body.get(field)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            return _bad(f"body.{field}", f"body.{field} is {shown(limit)}; it must be an integer above 0.")
    exact, size = prompt_bytes(body, endpoint == ENDPOINTS[0])
    return ItemSpec(
        custom_id=value["custom_id"],
        model=model.name,
        input_bytes=round(size * BYTES_PER_TOKEN) if exact else size,
    )


def _may_use(key: Key | None, model: str) -> bool:
    return key is None or not key.models or model in key.models


def by_name(models: Iterable[ModelSettings]) -> dict[str, ModelSettings]:
    """Models by every name that a client may use."""
    return {name: model for model in models for name in (model.name, *model.aliases)}


def answer_line(batch_id: str, index: int, custom_id: str, status: int, body: Any) -> bytes:
    """The line of a request that an engine answered, be it with an error."""
    id = request_id(batch_id, index)
    response = {"status_code": status, "request_id": id, "body": body}
    return orjson.dumps({"id": id, "custom_id": custom_id, "response": response, "error": None})


def error_line(batch_id: str, index: int, custom_id: str, code: str, message: str) -> bytes:
    """The line of a request that has no answer."""
    id = request_id(batch_id, index)
    error = {"code": code, "message": message}
    return orjson.dumps({"id": id, "custom_id": custom_id, "response": None, "error": error})


def _bad(param: str, message: str, code: str = "invalid_request") -> LineError:
    return LineError(code=code, message=message, param=param)
