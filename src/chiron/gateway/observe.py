"""What one engine does, seen from the gateway: enough for the control plane even when the engine tells nothing.

Every decoding request makes one token per engine step, so over an interval with the same requests::

    tokens = steps * decoding        and        ITL = busy / steps = (integral of decoding over time) / tokens

The integrals move only when a request begins or ends to decode; a relayed token costs two additions. What the engine's
own metrics say (exact steps, KV in use, its queue) takes precedence where it says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from chiron.core.types import Instance, Sample


class EngineObserver:
    """Totals of one instance. Times are the clock's seconds."""

    __slots__ = (
        "_at_s",
        "_batch_s",
        "_busy_s",
        "_context_s",
        "_decode_busy_s",
        "_inputs",
        "_instance",
        "_marked_batch_s",
        "_marked_context_s",
        "_marked_decode_busy_s",
        "_marked_tokens",
        "_prefill_steps",
        "_steps",
        "_token_steps",
        "decoding",
        "held_tokens",
        "inside",
        "prefill_tokens",
        "tokens",
    )

    def __init__(self, instance: Instance, now_s: float) -> None:
        self._instance = instance
        self._at_s = now_s
        self.inside = 0
        """Requests that the engine has and has not answered yet."""
        self.decoding = 0
        """Those of them that have their first token."""
        self.tokens = 0
        """Output tokens after the first of each request, ever."""
        self.held_tokens = 0
        """Output tokens of the requests that decode now."""
        self.prefill_tokens = 0
        self._inputs = 0
        self._busy_s = 0.0
        self._decode_busy_s = 0.0
        self._batch_s = 0.0
        self._context_s = 0.0
        self._prefill_steps = 0
        self._steps = 0.0
        self._token_steps = 0.0
        """Sum over steps of the decoding requests' contexts."""
        self._marked_batch_s = self._marked_context_s = self._marked_decode_busy_s = 0.0
        self._marked_tokens = 0

    def entered(self, now_s: float) -> None:
        self._advance(now_s)
        self.inside += 1

    def first_token(self, now_s: float, input_tokens: int) -> None:
        self._advance(now_s)
        if not self.decoding:
            self._prefill_steps += ceil(input_tokens / self._instance.kind.max_num_batched_tokens)
        self.decoding += 1
        self._inputs += input_tokens
        self.prefill_tokens += input_tokens

    def left(self, now_s: float, input_tokens: int, output_tokens: int, *, decoded: bool) -> None:
        """A request is over; ``output_tokens`` are those that were counted in ``held_tokens`` for it."""
        self._advance(now_s)
        self.inside -= 1
        if decoded:
            self.decoding -= 1
            self._inputs -= input_tokens
            self.held_tokens -= output_tokens

    def sample(self, now_s: float, metrics: Mapping[str, float] | None = None) -> Sample:
        """What a scrape shows now; ``metrics`` are the engine's own figures by our names (``engines.rows``)."""
        self._advance(now_s)
        tokens, batch_s = self.tokens - self._marked_tokens, self._batch_s - self._marked_batch_s
        if tokens > 0 and batch_s > 0.0:
            steps = (self._decode_busy_s - self._marked_decode_busy_s) * tokens / batch_s
            self._steps += steps
            decode_busy_s = self._decode_busy_s - self._marked_decode_busy_s
            if decode_busy_s > 0.0:
                self._token_steps += (self._context_s - self._marked_context_s) / decode_busy_s * steps
            self._marked_tokens = self.tokens
            self._marked_batch_s = self._batch_s
            self._marked_decode_busy_s = self._decode_busy_s
            self._marked_context_s = self._context_s
        said = metrics or {}
        capacity = self._instance.kv_capacity_tokens
        used = said.get("kv_used_tokens")
        if used is None and "kv_usage" in said:
            used = said["kv_usage"] * said.get("kv_capacity_tokens", capacity)
        exact = "steps" in said and "busy_s" in said
        waiting = int(said.get("waiting", 0))
        return Sample(
            instance_id=self._instance.id,
            taken_s=now_s,
            running=int(said.get("running", self.inside)),
            waiting=waiting,
            waiting_tokens=waiting * self._mean_input(),
            head_tokens=self._mean_input() if waiting else 0,
            kv_used_tokens=int(self._inputs + self.held_tokens if used is None else used),
            steps=int(said["steps"] if exact else self._steps + self._prefill_steps),
            busy_s=said["busy_s"] if exact else self._busy_s,
            decode_tokens=int(said.get("generation_tokens", self.tokens)) if exact else self.tokens,
            prefill_tokens=int(said.get("prompt_tokens", self.prefill_tokens)) if exact else self.prefill_tokens,
            context_tokens=said.get("context_tokens", self._token_steps) if exact else self._token_steps,
            preemptions=int(said.get("preemptions", 0)),
        )

    def _mean_input(self) -> int:
        return self._inputs // self.decoding if self.decoding else 1

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s <= 0.0:
            return
        self._at_s = now_s
        if self.inside:
            self._busy_s += passed_s
        if self.decoding:
            self._decode_busy_s += passed_s
            self._batch_s += passed_s * self.decoding
            self._context_s += passed_s * (self._inputs + self.held_tokens)
