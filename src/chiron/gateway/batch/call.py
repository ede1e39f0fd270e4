"""One item of a batch on its way through the control plane and an engine: the payload of its ``Request``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import orjson

from chiron.core.types import Request
from chiron.engines.claims import usage_details
from chiron.gateway.batch.lines import answer_line, error_line
from chiron.gateway.relay.body import Body
from chiron.gateway.relay.calls import ItemCall
from chiron.gateway.relay.collect import CollectError
from chiron.store.port import NO_TOKENS, Ended, Item, TokenUsage, request_id


class FarAnswer(NamedTuple):
    """An answer that was put together elsewhere."""

    body: bytes
    """JSON."""
    cached_tokens: int
    reasoning_tokens: int


class Elsewhere(Protocol):
    """A relay in another process that has the item's body, and what has come of its answer."""

    def item_ended(self, call: BatchCall, request: Request) -> None: ...


class BatchCall(ItemCall):
    """A leased item; ``on_end`` hears of its end, once."""

    collected = True

    def __init__(
        self, item: Item, body: Body, answer_max_bytes: int, on_end: Callable[[BatchCall, Request], None]
    ) -> None:
        super().__init__(
            path=item.endpoint.encode(),
            body=body,
            request_id=request_id(item.batch_id, item.index),
            key_name=item.owner,
            answer_max_bytes=answer_max_bytes,
        )
        self.item = item
        self.body = body
        self.answer_max_bytes = answer_max_bytes
        self.request: Request | None = None
        self.link: Elsewhere | None = None
        """Who carries it, if that is not this process."""
        self.here = 0
        """Its number there."""
        self.run: Any = None
        """Its placement there, while it has one."""
        self.far: FarAnswer | None = None
        self._on_end = on_end

    def ended(self, request: Request) -> None:
        if self.link is not None:
            self.link.item_ended(self, request)
        self._on_end(self, request)

    @property
    def tokens_seen(self) -> int:
        """Output tokens so far of this try."""
        return self.run.placed.tokens if self.run is not None else self.collector.tokens

    def result(self) -> Ended:
        """The result line of an answer, be it a refusal. Raises CollectError if there is none."""
        item = self.item
        status, body = self.outcome() if self.far is None else (self.status, orjson.Fragment(self.far.body))
        try:
            line = answer_line(item.batch_id, item.index, item.custom_id, status, body)
        except orjson.JSONEncodeError as error:
            # JSON can be read that is nested too deep to be written.
            raise CollectError(f"the engine's answer cannot be kept: {error}") from None
        usage = self._usage() if status < 400 else NO_TOKENS
        return Ended(batch_id=item.batch_id, index=item.index, ok=status < 400, line=line, usage=usage)

    def _usage(self) -> TokenUsage:
        """As keys pay for it, with the engine's details where they can be."""
        request = self.request
        assert request is not None
        input_tokens, output = self.prompt_tokens or request.input_tokens, request.tokens_done
        cached, reasoning = usage_details(self.collector.usage) if self.far is None else self.far[1:]
        return TokenUsage(input_tokens, min(cached, input_tokens), output, min(reasoning, output))


def failure(item: Item, code: str, message: str) -> Ended:
    """The end of an item that has no answer."""
    line = error_line(item.batch_id, item.index, item.custom_id, code, message)
    return Ended(batch_id=item.batch_id, index=item.index, ok=False, line=line)


def output_limit(fields: Mapping[str, Any]) -> int | None:
    """The most output tokens that a request allows, if it says."""
    limits = [fields.get(name) for name in ("max_completion_tokens", "max_tokens")]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)
