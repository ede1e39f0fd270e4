"""Formats of JSON Schema as patterns: each text that matches is of the format, though not every text of the format
matches. Formats that are not here are unknown, and say nothing, as JSON Schema has it."""

from __future__ import annotations

_HOST = r"[a-z]{3,10}\.(com|net|org)"
_DATE = r"20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_URI = rf"https://{_HOST}/[a-z]{{1,12}}"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P(T[1-9][0-9]?[HMS]|[1-9][0-9]?D)",
    "email": rf"[a-z]{{3,10}}@{_HOST}",
    "idn-email": rf"[a-z]{{3,10}}@{_HOST}",
    "hostname": _HOST,
    "idn-hostname": _HOST,
    "ipv4": rf"10\.{_BYTE}\.{_BYTE}\.{_BYTE}",
    "ipv6": r"([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "uri": _URI,
    "uri-reference": _URI,
    "uri-template": _URI,
    "iri": _URI,
    "iri-reference": _URI,
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "json-pointer": r"(/[a-z]{1,8}){1,3}",
    "relative-json-pointer": r"[0-9]/[a-z]{1,8}",
    "regex": r"[a-z]{1,8}",
}
