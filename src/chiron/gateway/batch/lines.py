"""Lines of batch files: what an input line must hold, and what a result line looks like. Pure functions.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": [...]}}
{"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}},
 "error": null}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import orjson
from msgspec import UNSET, Raw, Struct, UnsetType

from chiron.gateway.relay.admission import is_chat
from chiron.gateway.relay.body import (
    BYTES_PER_TOKEN,
    Body,
    check_text,
    read_body,
    small_value,
    steering_of,
    unreadable,
)
from chiron.gateway.relay.errors import ApiError, invalid, shown
from chiron.gateway.relay.keys import Key
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
            check_text(line)
            frame = _read_frame(line)
        except ApiError as error:
            said = error.message.replace("The body", "This line", 1)
            return LineError(code="invalid_json_line", message=f"{said.removesuffix('.')}.")
        return _check_frame(frame, endpoint) or _check_body(frame, endpoint, models, key)

    return check


def line_body(line: bytes, endpoint: str) -> Body | None:
    """The request in a line that was checked when its batch was accepted; None: the disk holds other bytes by now."""
    try:
        frame = _read_frame(line)
        return None if frame.body is UNSET else read_body(bytes(frame.body), is_chat(endpoint))
    except ApiError:
        return None


class _Frame(Struct, gc=False):
    """A line. What is long or nested is not read; what is no text is a ``Long``."""

    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: Raw | UnsetType = UNSET


class _RightFrame(Struct, gc=False):
    """One as it nearly always is."""

    custom_id: str | None = None
    method: str | None = None
    url: str | None = None
    body: Raw | UnsetType = UNSET


class _RawFrame(Struct, gc=False):
    custom_id: Raw | UnsetType = UNSET
    method: Raw | UnsetType = UNSET
    url: Raw | UnsetType = UNSET
    body: Raw | UnsetType = UNSET


_RIGHT_FRAME = msgspec.json.Decoder(_RightFrame)
_RAW_FRAME = msgspec.json.Decoder(_RawFrame)


def _read_frame(line: bytes) -> _Frame | _RightFrame:
    """Raises ApiError for what is no JSON object."""
    try:
        return _RIGHT_FRAME.decode(line)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, RecursionError) as error:
        raise unreadable(error) from None
    try:
        raw = _RAW_FRAME.decode(line)
    except msgspec.ValidationError:
        raise invalid("The body is not a JSON object") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise unreadable(error) from None
    custom_id, method, url = (
        None if part is UNSET else small_value(bytes(part)) for part in (raw.custom_id, raw.method, raw.url)
    )
    return _Frame(custom_id=custom_id, method=method, url=url, body=raw.body)


def _check_frame(frame: _Frame | _RightFrame, endpoint: str) -> LineError | None:
    """Everything around the body."""
    custom_id = frame.custom_id
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_MAX:
        return _bad(
            "custom_id",
            f"custom_id is {shown(custom_id)}; it must be a string of 1 to {CUSTOM_ID_MAX} characters.",
        )
    if frame.method != "POST":
        return _bad("method", f"method is {shown(frame.method)}; it must be 'POST'.", "invalid_method")
    if frame.url != endpoint:
        return _bad("url", f"url is {shown(frame.url)}; it must be the batch's endpoint, {endpoint!r}.", "invalid_url")
    return None


def _check_body(
    frame: _Frame | _RightFrame, endpoint: str, models: Mapping[str, ModelSettings], key: Key | None
) -> ItemSpec | LineError:
    body = b"" if frame.body is UNSET else bytes(frame.body)
    if not body.startswith(b"{"):
        value = small_value(body) if body else None
        return _bad("body", f"body is {shown(value)}; it must be an object, the request to {endpoint}.")
    read: Body | None = None
    wrong: ApiError | None = None
    try:
        read = read_body(body, is_chat(endpoint))
        fields = read.shape.fields
    except ApiError as error:
        wrong, fields = error, steering_of(body)
    name = fields.get("model")
    model = models.get(name) if isinstance(name, str) else None
    if model is None:
        known = ", ".join(sorted({m.name for m in models.values() if m.batch_class and _may_use(key, m.name)}))
        return _bad("body.model", f"body.model is {shown(name)}; models served here: {known}.", "model_not_found")
    if (cascade := model.cascade) is not None:
        parts = f"name {cascade.first!r} or {cascade.then!r}"
        return _bad("body.model", f"Model {model.name!r} is a cascade, and takes no batch requests: {parts}.")
    if not model.batch_class:
        return _bad("body.model", f"Model {model.name!r} takes no batch requests.", "model_not_found")
    if key is None:
        return _bad("body.model", "The API key that this batch belongs to no longer exists.", "permission_denied")
    try:
        key.permit(model.name, model.batch_class)
    except ApiError as error:
        return _bad("body.model", error.message, "permission_denied")
    if fields.get("stream"):
        return _bad("body.stream", f"body.stream is {shown(fields['stream'])}; answers of batches are not streamed.")
    if wrong is not None or read is None:
        return _bad(f"body.{wrong.param if wrong else ''}".rstrip("."), f"body.{wrong.message if wrong else ''}.")
    for field in ("max_tokens", "max_completion_tokens"):
        limit = fields.get(field)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            return _bad(f"body.{field}", f"body.{field} is {shown(limit)}; it must be an integer above 0.")
    return ItemSpec(
        custom_id=str(frame.custom_id),
        model=model.name,
        input_bytes=round(read.shape.tokens(BYTES_PER_TOKEN) * BYTES_PER_TOKEN),
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
