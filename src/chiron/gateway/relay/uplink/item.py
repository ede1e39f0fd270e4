"""An item of a batch at a relay: the brain has it in its store, and gets its answer as bytes."""

from __future__ import annotations

import orjson

from chiron.engines.claims import usage_details
from chiron.gateway.port import messages as m
from chiron.gateway.relay.admission import is_chat
from chiron.gateway.relay.body import read_body
from chiron.gateway.relay.calls import ItemCall


class RelayedItem(ItemCall):
    """An item of a batch; its answer goes to the brain as bytes."""

    def __init__(self, said: m.Item) -> None:
        path = said.path
        super().__init__(
            path=path.encode(),
            body=read_body(said.body, is_chat(path)),
            request_id=said.request_id,
            key_name="",
            answer_max_bytes=said.answer_max_bytes,
        )
        self._answer = b""
        self._answer_max_bytes = said.answer_max_bytes

    def end(self) -> str:
        problem = super().end()
        if problem or not (self.status < 300 or self.refused):
            return problem
        try:
            self._answer = orjson.dumps(self.outcome()[1])
        except orjson.JSONEncodeError as error:
            return f"the engine's answer cannot be kept: {error}"
        if len(self._answer) > self._answer_max_bytes:  # Numbers can be longer than the engine wrote them.
            self._answer = b""
            return f"the answer is larger than {self._answer_max_bytes} bytes"
        return ""

    def result(self, number: int) -> m.Result:
        cached, reasoning = usage_details(self.collector.usage)
        return m.Result(number, self.status if self.refused else 200, self._answer, cached, reasoning)
