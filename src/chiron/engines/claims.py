"""Figures that an engine reports, checked where they come in.

An engine may be faulty, misread, or run by somebody else, and its figures are counted, learned from, shown, and billed
to keys. So each of them passes through here once. An impossible one is dropped, and the caller uses what the gateway
measured instead; no code behind this module checks for absurd numbers again.

Of an answer the gateway sees its events, its bytes and its time, and the request may have set a limit. A count of
output tokens is accepted if it is within that limit, no larger than fits these bytes or this time (some engines reason
without showing it), and not many times smaller than the number of events.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Final

TOKENS_MAX: Final = 100_000_000
"""Tokens of one prompt or answer: ten times the longest context that there is."""
KV_TOKENS_MIN: Final = 256
KV_TOKENS_MAX: Final = 1_000_000_000
"""Tokens of KV of one instance. One with less than the first could serve no request."""
SEQUENCES_MAX: Final = 1_000_000
"""Sequences that run or wait in one engine."""
CHOICES_MAX: Final = 1024
"""Choices of one answer, and tool calls of one choice."""
TOKEN_ID_MAX: Final = (1 << 32) - 1
TOTAL_MAX: Final = float(1 << 53)
"""Of what only grows since the engine's start; whole numbers are exact up to here."""
STEPS_PER_S_MAX: Final = 1_000_000.0
TOKENS_PER_S_MAX: Final = 50_000.0
"""Of one answer that shows no text: several times what the fastest hardware does."""
EVENTS_PER_TOKEN_MAX: Final = 8
"""Some servers cut a token's text into letters."""
HIDDEN_PROMPT_TOKENS: Final = 65_536
"""Tokens of a prompt that have no bytes in the request: the chat template, an image that is named by its address."""
BYTES_PER_TOKEN: Final = 4.0
"""Of an answer in one piece whose engine does not say how many tokens it has."""
NAME_MAX: Final = 200
"""Characters of a name that an engine gives."""

_COUNT: Final = {"running": SEQUENCES_MAX, "waiting": SEQUENCES_MAX}
_TOKENS: Final = ("kv_blocks", "block_size", "kv_capacity_tokens", "kv_used_tokens", "waiting_tokens", "head_tokens")
_FIGURES: Final = {**_COUNT, **dict.fromkeys(_TOKENS, KV_TOKENS_MAX)}
"""The most that each figure of ``engines.rows`` may be; those not named are totals."""
_SHARE_ROUNDING: Final = 1.05
"""A share of KV up to this is a full one, rounded."""
_USAGE: Final = re.compile(rb'"(prompt|completion)_tokens"\s*:\s*([0-9]{1,9})(?![0-9.eE])')
_OF_USAGE: Final = b'_tokens"'
_BEFORE_OF_USAGE: Final = len('"completion')
"""Characters of what is matched before that, at the most."""


def whole(said: object, most: int) -> int | None:
    """A whole number from 0 to ``most``; None: it is not."""
    return said if type(said) is int and 0 <= said <= most else None


def figures(said: Mapping[str, float]) -> dict[str, float]:
    """Of an engine's metrics, by our names, those that are possible."""
    found = {}
    for name, value in said.items():
        if name == "kv_usage" and 1.0 < value <= _SHARE_ROUNDING:
            value = 1.0
        most = 1.0 if name == "kv_usage" else _FIGURES.get(name, TOTAL_MAX)
        least = KV_TOKENS_MIN if name == "kv_capacity_tokens" else 0.0
        if isfinite(value) and least <= value <= most:
            found[name] = value
    return found


def can_grow(
    seconds: float, *, steps: float, busy_s: float, decode_tokens: float, prefill_tokens: float, context_tokens: float
) -> bool:
    """Whether an engine's totals can have grown so much between two scrapes, ``seconds`` apart (one may be late)."""
    seconds = 2.0 * seconds + 5.0
    return (
        0.0 <= steps <= STEPS_PER_S_MAX * seconds
        and 0.0 <= busy_s <= seconds
        and 0.0 <= decode_tokens <= steps * SEQUENCES_MAX
        and 0.0 <= prefill_tokens <= (steps + 1.0) * KV_TOKENS_MAX
        and 0.0 <= context_tokens <= decode_tokens * KV_TOKENS_MAX
    )


def output_tokens_max(fields: Mapping[str, Any]) -> int | None:
    """The most output tokens that a request allows, over all its choices and prompts; None: it sets no limit."""
    limit, newer = fields.get("max_tokens"), fields.get("max_completion_tokens")
    if limit is None and newer is None:
        return None
    # Where both are named, engines differ in which one holds.
    most = max(whole(limit, TOKENS_MAX) or 0, whole(newer, TOKENS_MAX) or 0) or None
    if most is None:
        return None
    if "n" in fields or "best_of" in fields:
        most *= max(whole(fields.get(name), CHOICES_MAX) or 1 for name in ("n", "best_of"))
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        most *= len(prompt)
    return most


def output_tokens(
    said: int | None, *, seen: int, before: int, answer_bytes: int, took_s: float, most: int | None, streams: bool
) -> int:
    """Output tokens of an answer that is complete: as the engine says, if that can be, else as far as can be seen.

    ``seen`` events with text, ``before`` of them in earlier tries that this one went on from; ``answer_bytes`` and
    ``took_s`` are this try's; ``most`` is the request's limit.
    """
    if (
        said is not None
        and (most is None or said <= most)
        and said * EVENTS_PER_TOKEN_MAX >= seen
        and said <= max(answer_bytes, int(took_s * TOKENS_PER_S_MAX)) + before + 1
    ):
        return said
    if streams or said is None:
        return seen
    guess = int(answer_bytes / BYTES_PER_TOKEN)
    return guess if most is None else min(guess, most)


def prompt_tokens(said: int | None, *, body_bytes: int) -> int:
    """Tokens of a prompt as the engine says, if a body of so many bytes can be so long; 0: not known."""
    return said if said is not None and said <= body_bytes + HIDDEN_PROMPT_TOKENS else 0


def usage_in(text: bytes) -> tuple[int | None, int | None]:
    """Prompt and completion tokens in the ``usage`` at the end of an answer, the last that are named; None: none that
    can be."""
    prompt: int | None = None
    completion: int | None = None
    first = text.find(_OF_USAGE)  # Far faster than to try the expression at each quote.
    if first < 0:
        return None, None
    for kind, digits in _USAGE.findall(text, max(0, first - _BEFORE_OF_USAGE)):
        value = int(digits)
        if value > TOKENS_MAX:
            continue
        if kind == b"prompt":
            prompt = value
        else:
            completion = value
    return prompt, completion


def usage_counts(said: object) -> tuple[int, int] | None:
    """Prompt and completion tokens of a usage object; None: it has no such whole numbers."""
    if not isinstance(said, dict):
        return None
    prompt, completion = (whole(said.get(f"{kind}_tokens"), TOKENS_MAX) for kind in ("prompt", "completion"))
    return None if prompt is None or completion is None else (prompt, completion)


def usage_details(said: object) -> tuple[int, int]:
    """Cached tokens of the prompt and reasoning tokens of the answer, as far as a usage object says."""
    found = []
    for part, name in (("prompt", "cached_tokens"), ("completion", "reasoning_tokens")):
        details = said.get(f"{part}_tokens_details") if isinstance(said, dict) else None
        found.append(whole(details.get(name), TOKENS_MAX) if isinstance(details, dict) else None)
    return found[0] or 0, found[1] or 0


def usage(said: object) -> dict[str, Any] | None:
    """A usage object with whole numbers of tokens; None: it is none. Details beside them stay as they are where they
    are such numbers, and are left out where not."""
    if not isinstance(said, dict):
        return None
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    if any(name in said and whole(said[name], 2 * TOKENS_MAX) is None for name in counts):
        return None
    return _numbers(said, 3)


def _numbers(said: Mapping[str, Any], depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in said.items():
        if isinstance(value, dict):
            if depth:
                found[name] = _numbers(value, depth - 1)
        elif value is None or isinstance(value, float | str) or whole(value, 2 * TOKENS_MAX) is not None:
            found[name] = value
    return found


def token_ids(said: Sequence[object]) -> Sequence[int] | None:
    """Ids of tokens, as a resume hands them back; None: these are none."""
    return said if all(type(id) is int and 0 <= id <= TOKEN_ID_MAX for id in said) else None  # type: ignore[return-value]


def model_names(said: object) -> list[str] | None:
    """Names in a list of models; None: it is no such list."""
    data = said.get("data") if isinstance(said, dict) else None
    if not isinstance(data, list):
        return None
    names = [entry.get("id") if isinstance(entry, dict) else None for entry in data]
    return [name for name in names if isinstance(name, str) and len(name) <= NAME_MAX]


def is_status(status: int) -> bool:
    """Whether HTTP has such a status."""
    return 100 <= status < 600
