"""Request bodies and headers, as bytes: what does not change from request to request is made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import numpy as np

from chiron.core.types import RequestClass
from chiron.load.errors import require
from chiron.load.prompt import Filler, TokenMeter
from chiron.workload.types import Workload

Api = Literal["chat", "completions"]
Prompt = Literal["text", "token-ids"]

PATHS: dict[str, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
PROGRAM_HEADER = b"x-chiron-program"
"""Names the program that makes a call."""
RESERVED = ("model", "messages", "prompt", "max_tokens", "stream", "stream_options", "ignore_eos", "service_tier")


@dataclass(frozen=True, slots=True, kw_only=True)
class BodySettings:
    """What requests look like."""

    api: Api = "chat"
    prompt: Prompt = "text"
    """``token-ids`` needs the completions API."""
    slo_headers: bool = True
    """Send each class's SLOs as ``x-slo-ttft-ms`` and ``x-slo-tpot-ms``."""
    tiers: Mapping[str, str] = field(default_factory=dict)
    """``service_tier`` by class name. A class not named: ``flex`` if it is batch work, none if interactive."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every body, such as ``{"temperature": 0}``."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers of every request."""
    key: str = field(default="", repr=False)
    """API key, sent as a bearer token."""

    def __post_init__(self) -> None:
        require(self.api in PATHS, "api", self.api, f"one of {', '.join(PATHS)}")
        require(self.prompt in ("text", "token-ids"), "prompt", self.prompt, "text or token-ids")
        fits = self.prompt == "text" or self.api == "completions"
        require(fits, "prompt", self.prompt, "text with the chat API; token ids go to completions (--api completions)")
        for name in self.extra:
            require(name not in RESERVED, "extra body field", name, f"none of those set here: {', '.join(RESERVED)}")
        for name, value in [*self.headers.items(), ("authorization", self.key)]:
            clean = name.isascii() and value.isascii() and not set(name + value) & set("\r\n\0")
            # The value may be a secret: it is not repeated.
            require(clean and bool(name), "header", name, "ASCII without line breaks, and so must its value")

    @property
    def path(self) -> str:
        return PATHS[self.api]

    def tier(self, cls: RequestClass) -> str:
        """``service_tier`` of a class; empty: not sent."""
        return self.tiers.get(cls.name, "" if cls.interactive else "flex")


class Bodies:
    """Bodies of the rows of one workload. ``meters`` (by model name) learn while they are used."""

    def __init__(self, workload: Workload, settings: BodySettings, *, seed: int, ignore_eos: bool) -> None:
        self.meters = {model: TokenMeter() for model in workload.models}
        self.path = settings.path.encode()
        self._work = workload
        self._ids = settings.prompt == "token-ids"
        self._filler = Filler(seed, len(workload))
        self._meter = [self.meters[model] for model in workload.models]
        self._before = [_before(settings, model) for model in workload.models]
        self._after = _after(settings)
        self._tail = [
            [_tail(settings, cls, ignore_eos, stream) for stream in (False, True)] for cls in workload.classes
        ]
        self._headers = [headers_of(settings, cls) for cls in workload.classes]
        self._prompt_of = _prompts(workload)
        self._program = f"{seed}".encode()

    def headers(self, row: int) -> list[tuple[bytes, bytes]]:
        headers, programs = self._headers[self._work.cls[row]], self._work.programs
        if programs is None or programs.of[row] < 0:
            return headers
        return [*headers, (PROGRAM_HEADER, b"%b-%d" % (self._program, programs.of[row]))]

    def body(self, row: int, *, stream: bool) -> tuple[bytes, int]:
        """The body of a row, and the bytes of filler in it (0 with token ids)."""
        work = self._work
        model = work.model[row]
        wanted = int(work.input_tokens[row])
        if self._ids:
            size, text = 0, self._filler.token_ids(self._prompt_of(row), wanted)
        else:
            size = self._meter[model].size(wanted)
            text = self._filler.text(self._prompt_of(row), size)
            size = len(text)
        limit = b"%d" % work.output_tokens[row]
        return b"".join((self._before[model], text, self._after, limit, self._tail[work.cls[row]][stream])), size


def _prompts(workload: Workload) -> Callable[[int], int]:
    """The row whose prompt a row's begins with: of a program's calls the first, so that each goes on from the last."""
    programs = workload.programs
    if programs is None:
        return lambda row: row
    first = np.full(len(programs), -1, dtype=np.int64)
    rows = np.flatnonzero(programs.of >= 0)[::-1]
    first[programs.of[rows]] = rows
    return lambda row: row if programs.of[row] < 0 else int(first[programs.of[row]])


def headers_of(settings: BodySettings, cls: RequestClass | None) -> list[tuple[bytes, bytes]]:
    """Headers of a request; ``None``: without a class's SLOs."""
    made = {"content-type": "application/json", "user-agent": "chiron-load"}
    if settings.key:
        made["authorization"] = f"Bearer {settings.key}"
    if cls is not None and settings.slo_headers:
        made |= {
            name: f"{value * 1000:g}"
            for name, value in (("x-slo-ttft-ms", cls.ttft_s), ("x-slo-tpot-ms", cls.itl_s))
            if isfinite(value)
        }
    made |= {name.lower(): value for name, value in settings.headers.items()}
    return [(name.encode(), value.encode()) for name, value in made.items()]


def _before(settings: BodySettings, model: str) -> bytes:
    name = json.dumps(model)
    if settings.api == "chat":
        return f'{{"model":{name},"messages":[{{"role":"user","content":"'.encode()
    return f'{{"model":{name},"prompt":{"[" if settings.prompt == "token-ids" else chr(34)}'.encode()


def _after(settings: BodySettings) -> bytes:
    if settings.api == "chat":
        return b'"}],"max_tokens":'
    return b'],"max_tokens":' if settings.prompt == "token-ids" else b'","max_tokens":'


def _tail(settings: BodySettings, cls: RequestClass, ignore_eos: bool, stream: bool) -> bytes:
    fields: dict[str, Any] = {}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    if ignore_eos:
        fields["ignore_eos"] = True
    if stream and settings.tier(cls):  # What is not streamed is an item of a batch job, and has its tier from that.
        fields["service_tier"] = settings.tier(cls)
    fields |= settings.extra
    return ("," + json.dumps(fields)[1:]).encode() if fields else b"}"
