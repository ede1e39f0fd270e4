"""``/v1/batches``: jobs whose requests may wait, each with a deadline."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from chiron.core.units import DurationError, parse_duration, show_duration
from chiron.gateway.api.expiry import json_expiry_s
from chiron.gateway.api.files import authorization
from chiron.gateway.api.resource import json_object, json_response, known_fields, page, page_limit
from chiron.gateway.api.slots import Slots
from chiron.gateway.api.state import ApiState
from chiron.gateway.batch.lines import ENDPOINTS
from chiron.gateway.relay.errors import forbidden, invalid, not_found, shown, too_many
from chiron.gateway.relay.keys import Key
from chiron.store.port import Batch, LineError, NotFound
from chiron.store.progress import eta_s, items_per_s

FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after")
METADATA_MAX, METADATA_KEY_MAX, METADATA_VALUE_MAX = 16, 64, 512
"""Pairs, and characters of each side."""
PAGE_DEFAULT, PAGE_MAX = 20, 100
BUSY_RETRY_S = 5.0


class Batches:
    def __init__(self, state: ApiState) -> None:
        self._state = state
        self._bodies = Slots(state.limits.bodies_at_once_max, state.limits.peer_share, "batches", state.wall_s)

    async def create(self, request: Request) -> Response:
        state = self._state
        key = self._key(request)
        with self._bodies.taken(request, key):
            body = await json_object(request, state.limits.body_max_bytes, state.limits.body_timeout_s)
        known_fields(body, FIELDS)
        file_id = _text(body, "input_file_id")
        endpoint = _text(body, "endpoint")
        if endpoint not in ENDPOINTS:
            raise invalid(f"endpoint is {endpoint[:100]!r}; allowed: {', '.join(ENDPOINTS)}.", param="endpoint")
        window = _text(body, "completion_window")
        window_s = self._window_s(window)
        metadata = _metadata(body.get("metadata"))
        expiry_s = json_expiry_s("output_expires_after", body.get("output_expires_after"))
        if state.work.busy:
            raise too_many("Many batches wait for their validation.", BUSY_RETRY_S)
        await self._check_input(file_id, key)
        now_s = state.wall_s()
        batch = await state.store.create_batch(
            owner=key.name,
            input_file_id=file_id,
            endpoint=endpoint,
            completion_window=window,
            deadline_s=now_s + window_s,
            metadata=metadata,
            output_expires_after_s=expiry_s,
            now_s=now_s,
        )
        state.work.created(batch)
        return self._answer(batch)

    async def _check_input(self, file_id: str, key: Key) -> None:
        try:
            file = await self._state.store.get_file(file_id, key.owner)
        except NotFound:
            raise not_found(f"No such file: {file_id[:100]!r}.", param="input_file_id") from None
        if file.owner != key.name:  # As only the admin can see it.
            raise forbidden(
                f"File {file.id} was uploaded with another API key; a batch and its input belong to one key.",
                param="input_file_id",
            )
        if file.purpose != "batch":
            raise invalid(
                f"File {file.id} has purpose {file.purpose!r}; a batch needs one with purpose 'batch'.",
                param="input_file_id",
            )

    async def list(self, request: Request) -> Response:
        key = self._key(request)
        limit = page_limit(request, PAGE_DEFAULT, PAGE_MAX)
        batches = await self._state.store.list_batches(key.owner, request.query_params.get("after"), limit + 1)
        now_s = self._state.wall_s()
        return page([batch_object(batch, now_s) for batch in batches], limit)

    async def get(self, request: Request) -> Response:
        key = self._key(request)
        return self._answer(await self._state.store.get_batch(request.path_params["batch_id"], key.owner))

    async def cancel(self, request: Request) -> Response:
        key = self._key(request)
        return self._answer(await self._state.work.cancel(request.path_params["batch_id"], key.owner))

    def _answer(self, batch: Batch) -> Response:
        return json_response(batch_object(batch, self._state.wall_s()))

    def _window_s(self, text: str) -> float:
        least, most = self._state.batch.completion_window_min_s, self._state.batch.completion_window_max_s
        try:
            seconds = parse_duration(text)
        except DurationError as error:
            raise invalid(f"completion_window: {error}", param="completion_window") from None
        if not least <= seconds <= most:
            allowed = f"from {show_duration(least)} to {show_duration(most)}"
            raise invalid(
                f"completion_window is {text[:100]!r}; it must be {allowed}.",
                param="completion_window",
            )
        return seconds

    def _key(self, request: Request) -> Key:
        return self._state.keys.check(authorization(request))


def batch_object(batch: Batch, now_s: float) -> dict[str, Any]:
    """OpenAI's batch object, and under ``chiron`` how far it is; ``now_s`` is Unix time."""
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": list(map(_line_error, batch.errors))} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created_s),
        "in_progress_at": _at(batch.in_progress_s),
        "expires_at": int(batch.expires_s),
        "finalizing_at": _at(batch.finalizing_s),
        "completed_at": _at(batch.completed_s),
        "failed_at": _at(batch.failed_s),
        "expired_at": _at(batch.expired_s),
        "cancelling_at": _at(batch.cancelling_s),
        "cancelled_at": _at(batch.cancelled_s),
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.usage.input,
            "input_tokens_details": {"cached_tokens": batch.usage.cached},
            "output_tokens": batch.usage.output,
            "output_tokens_details": {"reasoning_tokens": batch.usage.reasoning},
            "total_tokens": batch.usage.input + batch.usage.output,
        },
        "metadata": dict(batch.metadata) or None,
        "chiron": {
            "eta_s": eta_s(batch, now_s),
            "items_per_s": items_per_s(batch, now_s),
            "deadline_at": int(batch.expires_s),
        },
    }


def _line_error(error: LineError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "param": error.param, "line": error.line}


def _at(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise invalid(f"{name} is {shown(value)}; it must be a text that is not empty.", param=name)
    return value


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > METADATA_MAX:
        raise invalid(f"metadata must be an object with at most {METADATA_MAX} pairs.", param="metadata")
    for name, text in value.items():
        if not 0 < len(name) <= METADATA_KEY_MAX:
            raise invalid(f"metadata: a name must have 1 to {METADATA_KEY_MAX} characters.", param="metadata")
        if not isinstance(text, str) or len(text) > METADATA_VALUE_MAX:
            raise invalid(
                f"metadata: {name!r} must be a text of at most {METADATA_VALUE_MAX} characters.", param="metadata"
            )
    return value
