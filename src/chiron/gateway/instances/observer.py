"""What one engine does, measured by the gateway: enough for the control plane even without the engine's metrics.

Every decoding sequence makes one token per engine step, so over an interval::

    steps per second = tokens / (seconds that the sequences behind them decoded, summed)
    decode tokens    = steps per second * (integral of decoding sequences over time)

A request is one sequence, or as many as it has choices.

Streams show their tokens as they come. An answer in one piece shows at its end how many it had, and so how fast steps
were while it decoded: late news, so it counts only while there are no streams. The integrals move only when a request
begins or ends to decode; a relayed block costs two additions. An engine's own totals take precedence where it tells
all of them.

What never ran shows nothing. Time in which nothing decodes is work only from when a request came that got its first
token at the end of it: another may have been inside for as long, and was refused. A stream that says nothing for a
while, because its client does not read or its engine has forgotten it, does not decode as far as anybody can tell, and
what it says at once afterwards took nobody knows how long. An answer in one piece that turns out to be a refusal after
it was presumed to decode is taken out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from chiron.core.types import Instance, Sample
from chiron.engines.claims import can_grow


class EngineTotals(NamedTuple):
    """The growing part of a ``Sample``."""

    steps: float = 0.0
    busy_s: float = 0.0
    decode_tokens: float = 0.0
    prefill_tokens: float = 0.0
    context_tokens: float = 0.0


class Begun(NamedTuple):
    """What the beginning of one request's decoding was counted as."""

    at_s: float
    input_tokens: int
    sequences: int
    steps: int
    prefilled: int
    busy_s: float
    alone_s: float
    """``EngineObserver._alone_s`` then."""


class EngineObserver:
    """Totals of one instance. Times are the clock's seconds."""

    __slots__ = (
        "_alone_s",
        "_alone_since_s",
        "_at_s",
        "_batch_s",
        "_busy_s",
        "_context_s",
        "_decode_busy_s",
        "_decoders",
        "_evidence_s",
        "_idle_since_s",
        "_inputs",
        "_instance",
        "_pending_prefill",
        "_pending_steps",
        "_piece_s",
        "_piece_tokens",
        "_sampled_s",
        "_seen",
        "_seen_tokens",
        "_told",
        "_totals",
        "decoding",
        "held_tokens",
        "inexact",
        "inside",
        "streaming",
        "tokens",
    )

    def __init__(self, instance: Instance, now_s: float) -> None:
        self._instance = instance
        self._at_s = self._sampled_s = now_s
        self.inside = 0
        """Requests that the engine has and has not answered yet."""
        self.decoding = 0
        """Sequences of those of them that have their first token."""
        self.streaming = 0
        """Those of these whose tokens can be seen."""
        self.tokens = 0
        """Output tokens of streams, ever, without the first of each."""
        self.held_tokens = 0
        """Output tokens of the requests that decode now."""
        self.inexact = False
        """Some of these may have been missed, until nothing decodes."""
        self._inputs = 0
        self._seen_tokens = 0
        self._evidence_s = 0.0
        """Seconds of decoding behind the tokens of streams since the last sample that showed something."""
        self._piece_tokens = 0
        self._piece_s = 0.0
        """Tokens of answers in one piece, and the seconds of decoding behind them, since then."""
        self._busy_s = self._decode_busy_s = self._batch_s = self._context_s = 0.0
        self._idle_since_s = self._alone_since_s = now_s
        """Since when nothing decodes, or one alone, if so."""
        self._decoders = 0
        """Requests that decode."""
        self._alone_s = 0.0
        """Time in which one alone decoded, ever."""
        self._pending_steps = self._pending_prefill = 0
        """Steps and tokens of prefill since then."""
        self._seen = EngineTotals()
        self._told: EngineTotals | None = EngineTotals()
        """By the engine at the last look: a new one has done nothing yet."""
        self._totals = EngineTotals()

    def entered(self, now_s: float) -> None:
        self._advance(now_s)
        self.inside += 1

    def first_token(
        self,
        now_s: float,
        input_tokens: int,
        *,
        entered_s: float,
        prefilled: int,
        streams: bool = True,
        sequences: int = 1,
    ) -> Begun:
        """A request begins to decode. ``prefilled``: tokens computed for it, 0 if its KV was there already. Returns
        what ``undo`` takes."""
        self._advance(now_s)
        steps, busy_s = 0, 0.0
        if not self.decoding:  # Beside others its prefill shares their steps.
            steps = ceil(prefilled / self._instance.max_num_batched_tokens)
            busy_s = max(0.0, now_s - max(entered_s, self._idle_since_s))
        self._pending_steps += steps
        self._pending_prefill += prefilled
        self._busy_s += busy_s
        self._join(input_tokens, 0, streams, sequences)
        return Begun(now_s, input_tokens, sequences, steps, prefilled, busy_s, self._alone_s)

    def undo(self, now_s: float, begun: Begun) -> None:
        """It was presumed to decode since then, and never did; to be called before ``left``."""
        self._advance(now_s)
        seconds = now_s - begun.at_s
        self._pending_steps -= begun.steps
        self._pending_prefill -= begun.prefilled
        self._busy_s -= begun.busy_s
        self._batch_s -= seconds * begun.sequences
        self._context_s -= seconds * begun.input_tokens
        self._forget(self._alone_s - begun.alone_s)  # Time in which nobody else made steps.

    def left(
        self,
        now_s: float,
        input_tokens: int,
        output_tokens: int,
        *,
        decoded: bool,
        streams: bool = True,
        sequences: int = 1,
    ) -> None:
        """A request is over; ``output_tokens`` are those that were counted in ``held_tokens`` for it."""
        self._advance(now_s)
        self.inside -= 1
        if decoded:
            self._part(now_s, input_tokens, output_tokens, streams, sequences)

    def fell_silent(
        self, now_s: float, since_s: float, input_tokens: int, output_tokens: int, sequences: int = 1
    ) -> None:
        """A stream that decodes says nothing any more since then."""
        self._advance(now_s)
        if self._decoders == 1:
            alone_s = now_s - max(since_s, self._alone_since_s)
            self._forget(alone_s)
            self._evidence_s = max(0.0, self._evidence_s - alone_s * sequences)
        self._part(now_s, input_tokens, output_tokens, True, sequences)

    def spoke_again(self, now_s: float, input_tokens: int, output_tokens: int, sequences: int = 1) -> None:
        self._advance(now_s)
        self._join(input_tokens, output_tokens, True, sequences)

    def _forget(self, seconds: float) -> None:
        """So much of the time in which something decoded was no steps, unless it has been shown already."""
        seconds = min(seconds, self._decode_busy_s)
        self._decode_busy_s -= seconds
        self._busy_s -= seconds

    def _join(self, input_tokens: int, output_tokens: int, streams: bool, sequences: int) -> None:
        self._decoders += 1
        self.decoding += sequences
        self._alone_since_s = self._at_s
        self.streaming += streams * sequences
        self._inputs += input_tokens
        self.held_tokens += output_tokens

    def _part(self, now_s: float, input_tokens: int, output_tokens: int, streams: bool, sequences: int) -> None:
        self._decoders -= 1
        self.decoding -= sequences
        self.streaming -= streams * sequences
        self._inputs -= input_tokens
        self.held_tokens -= output_tokens
        self._alone_since_s = self._at_s
        if not self.decoding:
            self._idle_since_s = now_s
            if self.inexact:
                self.held_tokens, self.inexact = 0, False

    def answered(self, tokens: int, decoding_s: float) -> None:
        """An answer in one piece: ``tokens`` after the first took ``decoding_s``, of all its sequences together."""
        if tokens > 0 and decoding_s > 0.0:
            self._piece_tokens += tokens
            self._piece_s += decoding_s

    def sample(self, now_s: float, metrics: Mapping[str, float] | None = None) -> Sample:
        """What a scrape shows now; ``metrics`` are the engine's own figures by our names (``engines.rows``)."""
        self._advance(now_s)
        said = metrics or {}
        totals = self._grow(now_s, _told(said))
        waiting = int(said.get("waiting", 0))
        mean_input = self._inputs // self.decoding if self.decoding else 1
        used = said.get("kv_used_tokens")
        if used is None and "kv_usage" in said:
            used = said["kv_usage"] * said.get("kv_capacity_tokens", self._instance.kv_capacity_tokens)
        return Sample(
            instance_id=self._instance.id,
            taken_s=now_s,
            running=int(said.get("running", self.inside)),
            waiting=waiting,
            waiting_tokens=int(said.get("waiting_tokens", waiting * mean_input)),
            head_tokens=int(said.get("head_tokens", mean_input if waiting else 0)),
            kv_used_tokens=int(self._inputs + self.held_tokens if used is None else used),
            steps=round(totals.steps),
            busy_s=totals.busy_s,
            decode_tokens=round(totals.decode_tokens),
            prefill_tokens=round(totals.prefill_tokens),
            context_tokens=totals.context_tokens,
            preemptions=int(said.get("preemptions", 0)),
        )

    def _grow(self, now_s: float, told: EngineTotals | None) -> EngineTotals:
        """Add what happened since the last sample: by the engine's word if it was heard both times, and can be so."""
        seen, told_before, passed_s = self._seen, self._told, now_s - self._sampled_s
        self._show()
        self._told, self._sampled_s = told, now_s
        if told is None or told_before is None or not _can_follow(told_before, told, passed_s):
            after, before = self._seen, seen
        else:
            after, before = told, told_before
        self._totals = EngineTotals(*(t + a - b for t, a, b in zip(self._totals, after, before, strict=True)))
        return self._totals

    def _show(self) -> None:
        """Turn what was seen since the last time into totals. Time of which nothing can be seen yet is kept for when
        something can: a long prefill, or answers in one piece that are under way."""
        per_s = self._steps_per_s()
        if self.inside and not per_s:
            return
        seen = self._seen
        # Less than nothing was seen if more was undone: totals never fall, and what comes next makes up for it.
        self._seen = EngineTotals(
            steps=seen.steps + per_s * self._decode_busy_s + max(0, self._pending_steps),
            busy_s=seen.busy_s + max(0.0, self._busy_s),
            decode_tokens=seen.decode_tokens + per_s * max(0.0, self._batch_s),
            prefill_tokens=seen.prefill_tokens + max(0, self._pending_prefill),
            context_tokens=seen.context_tokens + per_s * max(0.0, self._context_s),
        )
        self._pending_steps, self._pending_prefill = min(0, self._pending_steps), min(0, self._pending_prefill)
        self._busy_s, self._batch_s = min(0.0, self._busy_s), min(0.0, self._batch_s)
        self._context_s = min(0.0, self._context_s)
        self._seen_tokens = self.tokens
        self._piece_tokens = 0
        self._piece_s = self._evidence_s = self._decode_busy_s = 0.0

    def _steps_per_s(self) -> float:
        """While anything decodes; 0: not known."""
        tokens = self.tokens - self._seen_tokens
        if tokens > 0 and self._evidence_s > 0.0:
            return tokens / self._evidence_s
        return self._piece_tokens / self._piece_s if self._piece_tokens else 0.0

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s <= 0.0:
            return
        self._at_s = now_s
        if self.decoding:
            self._busy_s += passed_s
            self._decode_busy_s += passed_s
            self._evidence_s += passed_s * self.streaming
            self._batch_s += passed_s * self.decoding
            if self._decoders == 1:
                self._alone_s += passed_s
            self._context_s += passed_s * (self._inputs + self.held_tokens)


def _told(said: Mapping[str, float]) -> EngineTotals | None:
    """The totals of an engine that tells all of them: they fit together only if they are of one kind."""
    if not said.keys() >= set(EngineTotals._fields):
        return None
    return EngineTotals(*(said[name] for name in EngineTotals._fields))


def _can_follow(before: EngineTotals, after: EngineTotals, seconds: float) -> bool:
    """An engine that started again counts from nothing, and a broken one may say anything."""
    grown = EngineTotals(*(a - b for a, b in zip(after, before, strict=True)))
    return can_grow(seconds, **grown._asdict())
