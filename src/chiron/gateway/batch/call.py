"""One item of a batch on its way through the control plane and an engine: the payload of its ``Request``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from chiron.core.types import Request
from chiron.engines.claims import usage_details
from chiron.gateway.batch.lines import answer_line, error_line
from chiron.gateway.relay.body import Body
from chiron.gateway.relay.calls import CollectedCall
from chiron.gateway.relay.collect import CollectError
from chiron.gateway.relay.upstream import RETRIED
from chiron.store.port import NO_TOKENS, Ended, Item, TokenUsage, request_id


class BatchCall(CollectedCall):
    """A leased item; ``on_end`` hears of its end, once."""

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
        self.request: Request | None = None
        self._on_end = on_end

    def end(self) -> str:
        """A refusal may also come inside the stream; like one with a status of its own it is an answer."""
        said = self.collector.error
        if self.status < 300 and said is not None:
            code = said.get("code")
            if isinstance(code, int) and _is_no(code):
                self.status, self.answer = code, bytearray(orjson.dumps({"error": said}))
        return super().end()

    def ended(self, request: Request) -> None:
        self._on_end(self, request)

    @property
    def refused(self) -> bool:
        """The engine said no, and would say so again."""
        return _is_no(self.status)

    def result(self) -> Ended:
        """The result line of an answer, be it a refusal. Raises CollectError if there is none."""
        status, body = (self.status, _json(self.answer)) if self.refused else (200, self.collector.result())
        item = self.item
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
        cached, reasoning = usage_details(self.collector.usage)
        return TokenUsage(input_tokens, min(cached, input_tokens), output, min(reasoning, output))


def _is_no(status: int) -> bool:
    """501: the engine lacks what is asked for."""
    return (400 <= status < 500 or status == 501) and status not in RETRIED


def failure(item: Item, code: str, message: str) -> Ended:
    """The end of an item that has no answer."""
    line = error_line(item.batch_id, item.index, item.custom_id, code, message)
    return Ended(batch_id=item.batch_id, index=item.index, ok=False, line=line)


def output_limit(fields: Mapping[str, Any]) -> int | None:
    """The most output tokens that a request allows, if it says."""
    limits = [fields.get(name) for name in ("max_completion_tokens", "max_tokens")]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _json(body: bytes | bytearray) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return {"error": {"message": body.decode("utf-8", "replace")}}
