"""Requests that an engine refuses before it queues them: too long for its context, or its queue is full.

Gateways and clients rely on the codes, so all our engines use the same ones.
"""

from __future__ import annotations

from chiron.engines.serve.openai import GenerationRequest
from chiron.engines.serve.request_error import RequestError


def tokens_allowed(request: GenerationRequest, *, prompt_tokens: int, context_max: int) -> int:
    """Tokens to generate at most, those before a resume included. Raises RequestError if the context, ``context_max``
    tokens with the prompt, has no room for what is asked."""
    room, asked = context_max - prompt_tokens, request.max_tokens
    if room < 1 or (asked is not None and asked > room):
        wanted = "" if asked is None else f" and {asked} to generate"
        raise RequestError(
            f"This model's maximum context length is {context_max} tokens; the request has {prompt_tokens} in its "
            f"prompt{wanted}.",
            code="context_length_exceeded",
            param="max_tokens" if room >= 1 else ("messages" if request.chat else "prompt"),
        )
    return room if asked is None else asked


def check_queue(waiting: int, queue_max: int) -> None:
    """Raises RequestError (429) if one more than ``waiting`` would be too many."""
    if waiting >= queue_max:
        raise RequestError(
            f"{waiting} requests wait inside this engine already; allowed: {queue_max}.",
            status=429,
            type="rate_limit_error",
            code="queue_full",
            retry_after_s=1,
        )
