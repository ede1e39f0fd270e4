"""A desk with nobody behind it, and an engine that nobody asks: for tests of what relays carry. Compiled code takes no
other objects for them."""

from __future__ import annotations

import itertools
from typing import Any, cast

from chiron.core.types import Instance, InstanceKind
from chiron.engines.rows import ENGINES
from chiron.gateway.brain.desk import Desk
from chiron.gateway.instances.engine import InstanceEngine
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.upstream import EngineAddress
from chiron.gateway.settings import LimitSettings
from chiron.net.clock import LiveClock

NOBODY = cast(Any, None)
KIND = InstanceKind(name="k", gpu="g", gpus=1, price_per_gpu_hour=1.0, kv_capacity_tokens=1000, max_num_seqs=8)


def lone_desk(clock: LiveClock, keys: KeyRing) -> Desk:
    return Desk(
        clock=clock,
        completions=NOBODY,
        queues=NOBODY,
        keys=keys,
        limits=LimitSettings(),
        outages=NOBODY,
        next_id=itertools.count(1).__next__,
    )


def lone_engine(clock: LiveClock) -> InstanceEngine:
    return InstanceEngine(
        clock=clock,
        instance=Instance(1, "m", KIND, "mixed", 0.0),
        address=EngineAddress(url="http://127.0.0.1:9", row=ENGINES["openai"], model="m"),
        carry=NOBODY,
        listener=NOBODY,
        suspect=NOBODY,
    )
