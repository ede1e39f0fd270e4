"""A few requests before the run: is the server there, what does it count as a token, does it know ``ignore_eos``?"""

from __future__ import annotations

import json
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chiron.load.body import Bodies, BodySettings, headers_of
from chiron.load.errors import TargetError
from chiron.load.plan import LoadPlan
from chiron.net.client import ConnectError, NetError, Origin, Response

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
    origin: Origin,
    plan: LoadPlan,
    settings: BodySettings,
    *,
    ignore_eos: bool | None,
    calibrate: bool,
    timeout_s: float,
) -> Probed:
    """Ask each model for one token and learn from the usage. ``ignore_eos`` None: on if the server takes it.

    Raises TargetError if the server cannot be reached or refuses a plain request.
    """
    notes: list[str] = []
    seen: list[tuple[str, int, int]] = []
    on = ignore_eos is not False
    for model in plan.workload.models:
        for tokens in TOKENS if calibrate and settings.prompt == "text" else TOKENS[:1]:
            size, answer = await ask(origin, plan, settings, model, on, tokens, timeout_s)
            if answer.status in UNKNOWN_FIELD and on and ignore_eos is None:
                size, plain = await ask(origin, plan, settings, model, False, tokens, timeout_s)
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
    return "; is the server running there? (--url)" if isinstance(error, ConnectError) else ""


def text_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers}


def prompt_tokens(answer: Response) -> int | None:
    """As the server counted them; None if it did not."""
    try:
        return int(json.loads(answer.body)["usage"]["prompt_tokens"])
    except (ValueError, LookupError, TypeError):
        return None


def refusal(answer: Response) -> str:
    """A status and the server's words, in a line."""
    try:
        words = str(json.loads(answer.body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        words = answer.body[:200].decode("utf-8", "replace")
    hint = " (give a key with --key)" if answer.status == 401 else ""
    return f"status {answer.status}: {' '.join(words.split())[:200]}{hint}"
