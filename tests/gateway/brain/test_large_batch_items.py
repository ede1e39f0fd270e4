"""Batch items that are too large, or too many, for the connection to a relay: it is not lost over them."""

from __future__ import annotations

import asyncio
import json

import pytest

from chiron.core.types import Request, RequestClass
from chiron.gateway.batch.call import BatchCall
from chiron.gateway.brain.relay_link import ITEM_MAX_BYTES, ITEMS_MAX_BYTES
from chiron.gateway.brain.relays import Relays
from chiron.gateway.instances.engine import Placed
from chiron.gateway.port import messages as m
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.body import Body, read_body
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.uplink.item import RelayedItem
from chiron.net.client import Call, Origin
from chiron.net.clock import LiveClock
from chiron.store.port import Item
from lone_desk import lone_desk, lone_engine

NIGHT = RequestClass(name="night", kind="batch", deadline_s=86_400.0)
PATH = "/v1/chat/completions"
ASKED = b'{"model": "m", "messages": [{"role": "user", "content": "a"}]}'
MIB = 1 << 20
BODIES = {size: bytes(size) for size in (MIB, ITEMS_MAX_BYTES // 5, ITEM_MAX_BYTES, ITEM_MAX_BYTES + 1)}


def item_of(number: int, body_bytes: int) -> Placed:
    item = Item(
        batch_id="b", index=0, custom_id="c", model="m", endpoint=PATH, body=b"", deadline_s=1.0, attempts=0, owner=""
    )
    call = BatchCall(item, read_body(ASKED, True), MIB, lambda call, request: None)
    call.body = Body(BODIES[body_bytes], call.body.shape)
    return Placed(number, Request(number, "m", NIGHT, 0.0, 1, call), 0.0)


@pytest.mark.parametrize(
    ("body_bytes", "sent", "here"),
    [(MIB, [3, 2], 0), (ITEMS_MAX_BYTES // 5, [5, 5], 2), (ITEM_MAX_BYTES, [2, 2], 1), (ITEM_MAX_BYTES + 1, [0, 0], 1)],
    ids=["all have room", "too many", "two at each", "too large"],
)
def test_what_relays_have_no_room_for_is_sent_from_here(body_bytes: int, sent: list[int], here: int) -> None:
    async def main() -> None:
        clock, keys = LiveClock(asyncio.get_running_loop()), KeyRing()
        engine = lone_engine(clock)
        relays = Relays(
            clock=clock,
            desk=lone_desk(clock, keys),
            models=Models({}),
            keys=keys,
            engines={},
            responded=lambda status, count: None,
        )
        relays.links += [relays.link("relay 1"), relays.link("relay 2")]
        placed = [item_of(number, body_bytes) for number in range(1, sum(sent) + here + 1)]
        carried = [relays.carry(engine, each) for each in placed]
        assert [len(link.items) for link in relays.links] == sent
        assert carried.count(None) == here
        for each in placed:
            each.request.outcome = "finished"
            each.request.payload.ended(each.request)
        assert [link.item_bytes for link in relays.links] == [0, 0]
        assert relays.carry(engine, item_of(100, MIB)) is not None

    asyncio.run(main())


def test_an_answer_that_grows_as_it_is_written_is_refused() -> None:
    """1e15 becomes 1000000000000000.0."""
    said = m.Item(
        number=m.ITEMS_FROM, request_id="r", model="m", path=PATH, body=ASKED, input_tokens=1, answer_max_bytes=20_000
    )
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": "stop", "logprobs": {"content": []}}
    data = json.dumps({"id": "x", "choices": [choice]}).replace("[]", f"[{','.join(['1e15'] * 2000)}]")
    call = RelayedItem(said)
    call.begin(Call(Origin("http://127.0.0.1:9"), b"", call), 200, [])
    call.data(b"data: " + data.encode() + b"\n\ndata: [DONE]\n\n")
    assert call.end() == "the answer is larger than 20000 bytes"
