"""When files go by themselves: OpenAI's ``expires_after`` of an upload, and ``output_expires_after`` of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeGuard

from chiron.gateway.relay.errors import ApiError, invalid, shown

ANCHOR = "created_at"
SECONDS_MIN, SECONDS_MAX = 3600, 2_592_000
FORM_FIELDS = ("expires_after[anchor]", "expires_after[seconds]")
_DIGITS = re.compile(r"[0-9]{1,9}", re.ASCII)


def form_expiry_s(fields: Mapping[str, str], *, complete: bool) -> float | None:
    """Seconds after its creation that the file goes; None: never by itself. Raises ApiError 400. Not ``complete``:
    more fields may come."""
    given = [name in fields for name in FORM_FIELDS]
    if not any(given) or not (complete or all(given)):
        return None
    anchor, seconds = (fields.get(name) for name in FORM_FIELDS)
    whole = int(seconds) if seconds and _DIGITS.fullmatch(seconds) else seconds
    return _expiry_s("expires_after", {"anchor": anchor, "seconds": whole})


def json_expiry_s(name: str, value: object) -> float | None:
    """The same of field ``name`` of a JSON body."""
    return None if value is None else _expiry_s(name, value)


def _expiry_s(name: str, value: object) -> float:
    if not isinstance(value, Mapping) or set(value) - {"anchor", "seconds"}:
        raise _wrong(name, name, value, "an object with anchor and seconds")
    anchor, seconds = value.get("anchor"), value.get("seconds")
    if anchor != ANCHOR:
        raise _wrong(name, f"{name}.anchor", anchor, repr(ANCHOR))
    if not (_whole(seconds) and SECONDS_MIN <= seconds <= SECONDS_MAX):
        raise _wrong(name, f"{name}.seconds", seconds, f"an integer from {SECONDS_MIN} to {SECONDS_MAX}")
    return float(seconds)


def _wrong(param: str, name: str, value: object, allowed: str) -> ApiError:
    return invalid(f"{name} is {shown(value)}; it must be {allowed}.", param=param)


def _whole(value: object) -> TypeGuard[float]:
    """An integer as JSON has it: 3600.0 is one."""
    return type(value) is int or (isinstance(value, float) and value.is_integer())
