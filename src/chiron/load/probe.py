"""A few requests before the run: is the server there, what does it count as a token, does it know ``ignore_eos``?"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from chiron.core.units import show_duration
from chiron.engines.claims import usage_counts
from chiron.load.body import Bodies, BodySettings, headers_of
from chiron.load.errors import TargetError
from chiron.load.plan import LoadPlan
from chiron.load.settings import LoadSettings
from chiron.net.client import ConnectError, NetError, Origin, Response, TimedOutError

TOKENS = (40, 400)
"""Wanted lengths of the two probes of a model: two points make the line."""
UNKNOWN_FIELD = (400, 422)
"""Statuses by which servers refuse a field that they do not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What the probes found out."""

    bodies: Bodies
    ignore_eos: bool
    notes: tuple[str, ...]


async def probe(
    origin: Origin, plan: LoadPlan, sending: LoadSettings, waiting: Callable[[str], None] | None = None
) -> Probed:
    """Ask each model for one token and learn from the usage. ``waiting`` hears what is waited for, if it takes long.

    Raises TargetError if the server cannot be reached or refuses a plain request.
    """
    settings = sending.body
    notes: list[str] = []
    seen: list[tuple[str, int, int]] = []
    on = sending.ignore_eos is not False

    async def asked(model: str, ignore_eos: bool, tokens: int) -> tuple[int, Response]:
        with _told(origin, model, sending, waiting):
            return await ask(origin, plan, settings, model, ignore_eos, tokens, sending.probe_timeout_s)

    for model in plan.workload.models:
        for tokens in TOKENS if sending.calibrate and settings.prompt == "text" else TOKENS[:1]:
            size, answer = await asked(model, on, tokens)
            if answer.status in UNKNOWN_FIELD and on and sending.ignore_eos is None:
                size, plain = await asked(model, False, tokens)
                if plain.status == 200:
                    on, answer = False, plain
                    notes.append("the server does not take ignore_eos: outputs may end before their wanted length")
            if answer.status != 200:
                raise TargetError(f"{origin.url}: model {model!r}: {refusal(answer)}")
            counted = prompt_tokens(answer)
            if counted is not None and size:
                seen.append((model, size, counted))
    bodies = Bodies(plan.workload, settings, seed=plan.seed, ignore_eos=on)
    for model, size, counted in seen:
        bodies.meters[model].observe(size, counted)
    blind = [model for model in plan.workload.models if model not in {name for name, _, _ in seen}]
    if settings.prompt == "text" and blind:
        notes.append(f"{', '.join(blind)}: the server counts no prompt tokens, so prompt lengths are a guess")
    return Probed(bodies=bodies, ignore_eos=on, notes=tuple(notes))


@contextmanager
def _told(origin: Origin, model: str, settings: LoadSettings, waiting: Callable[[str], None] | None) -> Iterator[None]:
    """Say what is waited for, once it lasts."""
    text = (
        f"waiting for {origin.url}: no answer yet to a request for one token of model {model!r}; "
        f"it may take {show_duration(settings.probe_timeout_s)} (--probe-timeout), ctrl-C stops"
    )
    timer = asyncio.get_running_loop().call_later(settings.probe_patience_s, waiting or _nobody, text)
    try:
        yield
    finally:
        timer.cancel()


def _nobody(_: str) -> None:
    """Hears it where nobody else does."""


def probe_bodies(plan: LoadPlan, settings: BodySettings, model: str, ignore_eos: bool, tokens: int) -> Bodies:
    """Bodies of a workload of one request for one token."""
    work = plan.workload
    one = replace(
        work,
        arrival_s=work.arrival_s[:1],
        input_tokens=work.input_tokens[:1] * 0 + tokens,
        output_tokens=work.output_tokens[:1] * 0 + 1,
        model=work.model[:1] * 0,
        cls=work.cls[:1],
        deadline_s=work.deadline_s[:1],
        models=(model,),
    )
    return Bodies(one, settings, seed=plan.seed, ignore_eos=ignore_eos)


async def ask(
    origin: Origin, plan: LoadPlan, settings: BodySettings, model: str, ignore_eos: bool, tokens: int, timeout_s: float
) -> tuple[int, Response]:
    """One probe: its bytes of filler, and the answer. Without SLO headers: it may wait for an instance to start."""
    body, size = probe_bodies(plan, settings, model, ignore_eos, tokens).body(0, stream=False)
    try:
        answer = await origin.fetch(
            "POST", settings.path, body=body, headers=text_headers(headers_of(settings, None)), timeout_s=timeout_s
        )
    except NetError as error:
        raise TargetError(f"no answer to a probe: {error}{_hint(error)}") from error
    return size, answer


def _hint(error: NetError) -> str:
    if isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return "; --cacert FILE names the one to trust, --insecure trusts any"
    if isinstance(error, TimedOutError):
        return "; --probe-timeout sets how long"
    return "; is the server running there? (--url)" if isinstance(error, ConnectError) else ""


def text_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers}


def prompt_tokens(answer: Response) -> int | None:
    """As the server counted them; None if it did not."""
    try:
        counts = usage_counts(json.loads(answer.body)["usage"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return counts and counts[0]


def refusal(answer: Response) -> str:
    """A status and the server's words, in a line."""
    try:
        words = str(json.loads(answer.body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        words = answer.body[:200].decode("utf-8", "replace")
    hint = " (give a key with --key)" if answer.status == 401 else ""
    return f"status {answer.status}: {' '.join(words.split())[:200]}{hint}"
