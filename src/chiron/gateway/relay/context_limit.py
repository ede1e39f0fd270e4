"""The longest context that a model's engines have, and prompts that are longer: they are refused at the door.

An engine that is asked for the impossible says 400 itself, but not before the prompt has been counted, queued and
sent to it. Engines tell their context (``engines.rows``), or the config does. How many tokens a text has is an
estimate, so a prompt is refused here only if it could not fit whatever its text is; between that and the limit the
engine is the judge.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from chiron.engines import claims
from chiron.engines.rows import EngineRow
from chiron.gateway.relay.errors import ApiError, invalid
from chiron.net.client import NetError, Origin

log = logging.getLogger("chiron.context")

DENSEST_TEXT = 32.0
"""Bytes that one token holds at the very most, over a whole prompt: English has 4 to 5, source code with deep
indentation up to 10."""
BODY_MAX_BYTES = 1 << 20
TIMEOUT_S = 2.0
UNTOLD = 0
"""A context that is not known."""


def check_context(context_tokens: int, *, text_bytes: int, token_ids: int, prompts: int, chat: bool) -> None:
    """Raises ApiError, as OpenAI says it, if the ``prompts`` together are longer than so many contexts."""
    if context_tokens == UNTOLD:
        return
    least = int(text_bytes / DENSEST_TEXT) + token_ids
    if least > context_tokens * max(1, prompts):
        raise too_long(context_tokens, least if not text_bytes else None, chat)


def too_long(context_tokens: int, tokens: int | None, chat: bool) -> ApiError:
    what = "messages" if chat else "prompt"
    found = f"resulted in {tokens} tokens" if tokens is not None else "resulted in more"
    return invalid(
        f"This model's maximum context length is {context_tokens} tokens. However, your {what} {found}. "
        f"Please reduce the length of the {what}.",
        param=what,
        code="context_length_exceeded",
    )


def longest(contexts: Iterable[int | None]) -> int:
    """Of a model, from those of its engines: None of one that has not been asked yet, ``UNTOLD`` of one that did not
    tell. One that did not tell may have any."""
    known = [context for context in contexts if context is not None]
    return max(known, default=UNTOLD) if UNTOLD not in known else UNTOLD


async def ask_context(origin: Origin, row: EngineRow, model: str, headers: Mapping[str, str]) -> int | None:
    """Tokens; ``UNTOLD`` if the engine answers and does not say, None if it does not answer."""
    if not row.context_path:
        return UNTOLD
    once = {**headers, "connection": "close"}
    try:
        answer = await origin.fetch("GET", row.context_path, headers=once, timeout_s=TIMEOUT_S, body_max=BODY_MAX_BYTES)
    except NetError as error:
        log.debug("%s: no context: %s", origin.url, error)
        return None
    if answer.status != 200:
        return UNTOLD
    try:
        return read_context(json.loads(answer.body), row, model)
    except (ValueError, RecursionError):
        return UNTOLD


def read_context(said: Any, row: EngineRow, model: str) -> int:
    """What an answer says of the context of ``model``: of a list of models its own entry, or the only one."""
    if isinstance(said, dict) and isinstance(entries := said.get("data"), list):
        named = [entry for entry in entries if isinstance(entry, dict)]
        said = next((entry for entry in named if entry.get("id") == model), named[0] if len(named) == 1 else None)
    for keys in row.context_keys:
        value = said
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found = claims.whole(value, claims.KV_TOKENS_MAX)
        if found is not None and found >= claims.KV_TOKENS_MIN:
            return found
    return UNTOLD
