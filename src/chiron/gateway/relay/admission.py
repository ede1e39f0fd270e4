"""From an HTTP request to a request of the control plane: whose, which model, which class, how long a prompt.

Class of a request, first match wins: header ``x-chiron-class`` (a class by name), ``service_tier: "flex"`` (the
model's batch class), SLO headers ``x-slo-ttft-ms`` and ``x-slo-tpot-ms`` (the model's interactive class whose ITL is
nearest below what is requested, with the requested values as its SLOs), else the model's default class.

Header ``x-chiron-program`` names the program (an agent, a chat) whose call it is, among those of its key: 1 to 128
characters of ASCII that can be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple

from chiron.core.types import RequestClass
from chiron.gateway.relay.body import BYTES_PER_TOKEN, Body, Shape, read_body
from chiron.gateway.relay.context_limit import UNTOLD, check_context
from chiron.gateway.relay.errors import invalid, model_not_found, shown
from chiron.gateway.relay.keys import Key
from chiron.gateway.settings import ModelSettings
from chiron.net.server import Incoming

_RATIO_WEIGHT = 0.02
_SLO_MIN_MS, _SLO_MAX_MS = 0.001, 3_600_000.0
PROGRAM_MAX_BYTES = 128


@dataclass(slots=True)
class ServedModel:
    """A model as the front knows it."""

    settings: ModelSettings
    classes: Mapping[str, RequestClass]
    """Those that it serves."""
    kv_capacity_tokens: int
    context_tokens: int = UNTOLD
    """Longest prompt and answer together that any of its engines takes; 0: not known."""
    bytes_per_token: float = BYTES_PER_TOKEN
    """Learned from prompt lengths that the engine reports."""

    def learn(self, prompt_bytes: int, prompt_tokens: int) -> None:
        if prompt_bytes > 0 and prompt_tokens > 0:
            seen = min(16.0, max(0.25, prompt_bytes / prompt_tokens))
            self.bytes_per_token += _RATIO_WEIGHT * (seen - self.bytes_per_token)

    @property
    def tokens_max(self) -> int:
        """What an engine can hold. The engine itself decides what is too long, so no estimate goes beyond."""
        return min(self.kv_capacity_tokens - 1, self.context_tokens or self.kv_capacity_tokens)

    def tokens(self, text_bytes: int) -> int:
        """An estimate."""
        return max(1, min(int(text_bytes / self.bytes_per_token), self.tokens_max))

    def tokens_of(self, shape: Shape) -> int:
        """Of a whole prompt: ids count as they are, also where no engine could hold them."""
        ids = shape.token_ids
        text = self.tokens(shape.text_bytes) if shape.text_bytes else 0
        return min(ids + text, max(ids, self.tokens_max)) if ids else text


class Admitted(NamedTuple):
    """The result of admission for one request."""

    body: Body
    model: ServedModel
    cls: RequestClass
    input_tokens: int
    stream: bool
    program: str
    """Empty: it is of none."""


class Models:
    """Served models by name and alias."""

    def __init__(self, models: Mapping[str, ServedModel], cascades: Mapping[str, ServedModel] | None = None) -> None:
        self.by_name = dict(models)
        self.cascades = dict(cascades or {})
        """Those without instances, by name: others of ``by_name`` answer for them."""
        self._found: dict[str, ServedModel] = {}
        self._name()

    def _name(self) -> None:
        self._found = self.cascades | self.by_name
        for served in (*self.by_name.values(), *self.cascades.values()):
            for alias in served.settings.aliases:
                self._found.setdefault(alias, served)

    def renew(self, models: Mapping[str, ServedModel]) -> None:
        """Serve these from now on; what was learned of those that stay is kept."""
        for name, served in models.items():
            if (known := self.by_name.get(name)) is not None:
                served.bytes_per_token = known.bytes_per_token
        self.by_name.clear()
        self.by_name.update(models)
        self._name()

    def named(self, name: str) -> ServedModel | None:
        """By name or alias, for any key."""
        return self._found.get(name)

    def part(self, name: str) -> ServedModel:
        """One of the models that answer for a cascade. Raises ApiError 404: it is served no more."""
        served = self.by_name.get(name)
        if served is None:
            raise model_not_found(name, [])
        return served

    def permit(self, key: Key, model: str, cls: str, cascade: str) -> None:
        """Whether the key may have a request of this class run by ``model``, itself or (not empty) for ``cascade``.
        Raises ApiError 403."""
        served = self.cascades.get(cascade)
        parts = served.settings.cascade if served is not None else None
        asked = cascade if parts is not None and model in (parts.first, parts.then) else model
        key.permit(asked, cls)

    def find(self, name: object, key: Key) -> ServedModel:
        """Raises ApiError 404 or 403."""
        served = self._found.get(name) if isinstance(name, str) else None
        if served is None:
            if not isinstance(name, str):
                raise invalid(
                    "model: missing, or not text" if name is None else f"model: {shown(name)} is not text",
                    param="model",
                )
            known = [n for n in (*self.by_name, *self.cascades) if not key.models or n in key.models]
            raise model_not_found(name[:200], known)
        if key.models:
            key.permit(model=served.settings.name)
        return served


def admit(incoming: Incoming, key: Key, models: Models, body: Body | None = None) -> Admitted:
    """Raises ApiError with the status that the client gets. ``body``: what was read of it already."""
    if body is None:
        body = read_body(incoming.body, is_chat(incoming.path))
    fields = body.shape.fields
    served = models.find(fields.get("model"), key)
    cls, program = _said(incoming, fields, served)
    if key.classes:
        key.permit(cls=cls.name)
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise invalid(f"stream: {shown(stream)} must be true or false", param="stream")
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise invalid(f"stream_options: {shown(options)} must be an object", param="stream_options")
    check_fits(served, body.shape, is_chat(incoming.path))
    tokens = served.tokens_of(body.shape)
    return Admitted(body=body, model=served, cls=cls, input_tokens=tokens, stream=bool(stream), program=program)


def check_fits(served: ServedModel, shape: Shape, chat: bool) -> None:
    """Raises ApiError for a prompt that none of the model's engines can hold."""
    if served.context_tokens == UNTOLD:
        return
    check_context(
        served.context_tokens,
        text_bytes=shape.sure_bytes,
        token_ids=shape.token_ids,
        prompts=shape.prompts,
        chat=chat,
    )


def is_chat(path: str) -> bool:
    return path.endswith("/chat/completions")


def _said(incoming: Incoming, fields: Mapping[str, Any], served: ServedModel) -> tuple[RequestClass, str]:
    """Its class, and its program."""
    named = ttft = tpot = None
    program = ""
    for name, value in incoming.headers:
        if name[:2] != b"x-":
            continue
        if name == b"x-chiron-class":
            named = value.decode("latin-1")
        elif name == b"x-slo-ttft-ms":
            ttft = _milliseconds("x-slo-ttft-ms", value)
        elif name == b"x-slo-tpot-ms":
            tpot = _milliseconds("x-slo-tpot-ms", value)
        elif name == b"x-chiron-program":
            program = program_of(value)
    return _class_of(fields, served, named, ttft, tpot), program


def program_of(value: bytes) -> str:
    """Raises ApiError for what is no name of a program."""
    if not 0 < len(value) <= PROGRAM_MAX_BYTES or not value.isascii() or any(not 33 <= each <= 126 for each in value):
        said = value[:40].decode("latin-1") + ("..." if len(value) > 40 else "")
        allowed = f"1 to {PROGRAM_MAX_BYTES} visible ASCII characters, without spaces"
        raise invalid(f"x-chiron-program: {said!r} ({len(value)} bytes) is no name of a program; allowed: {allowed}")
    return value.decode("ascii")


def _class_of(
    fields: Mapping[str, Any], served: ServedModel, named: str | None, ttft: float | None, tpot: float | None
) -> RequestClass:
    settings, classes = served.settings, served.classes
    if named is not None:
        cls = classes.get(named)
        if cls is None:
            allowed = ", ".join(classes)
            raise invalid(f"x-chiron-class: {named!r} is no class of {settings.name!r}; allowed: {allowed}")
    elif fields.get("service_tier") == "flex":
        if not settings.batch_class:
            raise invalid(f"service_tier: 'flex' is not offered for {settings.name!r}", param="service_tier")
        return classes[settings.batch_class]
    else:
        cls = classes[settings.default_class]
    if (ttft is None and tpot is None) or not cls.interactive:
        return cls
    if named is None and tpot is not None:
        cls = _nearest(tuple(c for c in classes.values() if c.interactive), tpot)
    return with_slos(cls, ttft, tpot)


@lru_cache(maxsize=1024)
def _nearest(classes: tuple[RequestClass, ...], itl_s: float) -> RequestClass:
    """The class that engines run fast enough for: the loosest ITL that is no looser than asked, else the tightest."""
    fitting = [c for c in classes if c.itl_s <= itl_s]
    return max(fitting, key=lambda c: c.itl_s) if fitting else min(classes, key=lambda c: c.itl_s)


@lru_cache(maxsize=4096)
def with_slos(cls: RequestClass, ttft_s: float | None, itl_s: float | None) -> RequestClass:
    """The class with the SLOs that the client set."""
    return replace(cls, ttft_s=cls.ttft_s if ttft_s is None else ttft_s, itl_s=cls.itl_s if itl_s is None else itl_s)


def _milliseconds(name: str, value: bytes) -> float:
    text = value.decode("latin-1").strip()
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not (isfinite(number) and _SLO_MIN_MS <= number <= _SLO_MAX_MS):
        raise invalid(f"{name}: {text!r} must be a number of milliseconds from {_SLO_MIN_MS} to {_SLO_MAX_MS:.0f}")
    return number / 1000.0
