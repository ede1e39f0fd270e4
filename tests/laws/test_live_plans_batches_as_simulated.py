"""Law 10 for batch work that a store holds: announced as sums, submitted through a window, interrupted, gone on with.

The batch runner feeds the control plane as the window empties, so what it said and when is written down, and the
simulator's control plane is told the same at the same times. Everything that follows must be equal to the last bit.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import orjson
import pytest

from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Decision, Instance, ModelSpec, Request
from chiron.engines.remote import Wire
from chiron.fleet.model import ColdStart, Failures, FleetModel
from chiron.gateway.batch.runner import BatchRunner
from chiron.gateway.settings import BatchSettings
from chiron.policies.registry import make_policy
from chiron.runtime.assembly import Assembly
from chiron.runtime.input_log import Write, described
from chiron.runtime.modelled import ModelledEngines, ModelScraper
from chiron.runtime.replay import replay
from chiron.store.port import Item
from memory_store import MemoryStore
from real_path import Client, Faults, Site, completion
from scenario_factory import CLASSES, PROFILE, kind_of
from virtual_loop import run_virtual

PROFILE = replace(
    PROFILE,
    h_ms=12.0,
    w0_ms=2.0,
    f_ms_per_token=0.6,
    c_ms_per_context_token=0.02,
    kv_capacity_tokens=1500,
    kv_bytes_per_token=2_000_000,
    max_num_seqs=24,
    max_num_batched_tokens=128,
)
CHAT, _, NIGHT, _ = CLASSES
MODELS = (
    ModelSpec(
        name="m0",
        kinds=(kind_of(PROFILE, max_num_batched_tokens=PROFILE.max_num_batched_tokens),),
        max_instances=6,
    ),
)
COLD_START = ColdStart(node_start_s=1.0, model_load_s=2.0, warm_load_s=1.0, warm_for_s=30.0, jitter=0.1)
FAILURES = Failures(at=(12.0, 21.0), start_failure=0.2)
WIRE = Wire(network_s=1 / 1024, faults={n: ((0, 0), (503,), (0,))[n % 3] for n in range(0, 500, 9)})
Told = Callable[[ControlPlane, dict[int, Request]], None]


class Journal:
    """Decisions, ends, and what the control plane was told by clients and by the batch runner."""

    def __init__(self, *, writes_down: bool = False) -> None:
        self.wants_events = writes_down
        self.numbers: dict[int, int] = {}
        """Of prompts, by request."""
        self.numbers_of_items: dict[tuple[str, int], int] = {}
        self.numbers_of_clients: list[int] = []
        self.decisions: list[str] = []
        self.ends: list[tuple[Any, ...]] = []
        self.told: list[tuple[float, Told]] = []

    def decided(self, now_s: float, decision: Decision) -> None:
        self.decisions.append(repr((now_s, decision)))

    def ended(self, request: Request) -> None:
        r = request
        self.ends.append((r.id, r.outcome, r.dispatch_s, r.first_token_s, r.finish_s, r.tokens_done, r.evictions))
        if r.outcome == "cancelled":
            self.told.append((r.finish_s, lambda plane, requests: plane.cancel(requests[r.id])))

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        if name != "arrival":
            return
        assert request is not None
        if request.interactive:
            self.numbers[request.id] = self.numbers_of_clients.pop(0)
        else:
            item = request.payload.item
            self.numbers[request.id] = self.numbers_of_items[item.batch_id, item.index]
        r, length, retries = request, request.payload.output_max, request.retries

        def submit(plane: ControlPlane, requests: dict[int, Request]) -> None:
            same = Request(r.id, r.model, r.cls, now_s, r.input_tokens, length, r.deadline_s)
            same.pinned, same.flex, same.retries = r.pinned, r.flex, retries
            requests[r.id] = same
            plane.submit(same)

        self.told.append((now_s, submit))


@dataclass
class Announcements:
    """Passes them on, and writes them down."""

    site: Site
    journal: Journal

    def announce_batch(self, *work: Any) -> None:
        now_s = self.site.clock.now_s
        self.journal.told.append((now_s, lambda plane, requests: plane.announce_batch(*work)))
        self.site.gateway.inputs.announce_batch(*work)


def fields(number: int, draw: Random) -> dict[str, Any]:
    prompt = [number] + [7] * draw.randint(10, 80)
    return {"model": "m0", "prompt": prompt, "max_tokens": draw.randint(5, 25), "ignore_eos": True, "stream": True}


async def live(record: Write | None = None) -> tuple[Journal, MemoryStore]:
    loop, draw, journal, store = asyncio.get_running_loop(), Random(3), Journal(writes_down=True), MemoryStore()
    site = Site(
        models=MODELS,
        classes=CLASSES,
        profiles={PROFILE.name: PROFILE},
        policy=make_policy("chiron", None),
        journal=journal,
        cold_start=COLD_START,
        failures=FAILURES,
        network_s=WIRE.network_s,
        fault=Faults(WIRE.faults),
        batch_class=NIGHT.name,
        record=record,
    )
    site.begin({"m0": 1})
    runner = BatchRunner(
        store=store,  # type: ignore[arg-type]
        clock=site.clock,
        completions=site.gateway.inputs,
        announcements=Announcements(site, journal),
        models=site.models,
        keys=site.keys,
        next_id=site.next_id,
        settings=BatchSettings(window_max=24),
    )
    await runner.start()
    clients, numbers = 0, iter(range(10_000))

    def item(batch: str, index: int, deadline_s: float) -> Item:
        number = journal.numbers_of_items[batch, index] = next(numbers)
        body = json.dumps({"body": fields(number, draw)}).encode()
        return Item(
            batch_id=batch,
            index=index,
            custom_id=str(index),
            model="m0",
            endpoint="/v1/completions",
            body=body,
            deadline_s=deadline_s,
            attempts=0,
            owner="",
        )

    loop.call_at(2.3, store.add, [item("late", i, 60.0) for i in range(120)])
    loop.call_at(9.6, store.add, [item("soon", i, 40.0) for i in range(60)])
    at_s = 0.0
    while at_s < 30.0:
        at_s += draw.expovariate(12.0 if 14.0 < at_s < 20.0 else 2.0)
        clients += 1
        journal.numbers_of_clients.append(next(numbers))
        message = completion(fields(journal.numbers_of_clients[-1], draw), f"x-chiron-class: {CHAT.name}")
        loop.call_at(at_s, site.ask, Client(), message)
    while len(store.ended) < 180 or len(journal.ends) < 180 + clients:
        await asyncio.sleep(1.0)
    await runner.close()
    await site.close()
    return journal, store


def simulated(real: Journal) -> Journal:
    clock, journal, requests = VirtualClock(), Journal(), dict[int, Request]()
    # An item that was lost comes again under another number: what is left of its faults is the same for both.
    left: dict[int, Any] = {number: iter(WIRE.faults.get(number, ())) for number in real.numbers.values()}
    wire = replace(WIRE, faults={id: left[number] for id, number in real.numbers.items()})
    engines = ModelledEngines(clock=clock, profiles={PROFILE.name: PROFILE}, kv_transfer_gb_per_s=20.0, wire=wire)
    fleet = FleetModel(clock=clock, cold_start=COLD_START, failures=FAILURES, seed=0, make_engine=engines.make)
    engines.suspect = fleet.suspect
    assembly = Assembly(
        clock=clock,
        fleet=fleet,
        journal=journal,
        models=MODELS,
        classes=CLASSES,
        policy=make_policy("chiron", None),
    )
    engines.listener = assembly.plane
    scraper = ModelScraper(
        clock=clock,
        plane=assembly.plane,
        engines=lambda: engines.of(fleet.engines),
        period_s=1.0,
        delay_s=0.0,
    )
    assembly.begin({"m0": 1}, attach=fleet.attach_running, loops=(scraper, fleet))
    for at_s, tell in real.told:
        clock.run_until(at_s)
        tell(assembly.plane, requests)
    while assembly.plane.open_requests:
        clock.step()
    return journal


@pytest.mark.slow
def test_decides_the_same_about_batch_work_that_a_store_holds() -> None:
    lines: list[dict[str, Any]] = [
        {"t": 0.0, "event": "log", **described(make_policy("chiron", None), MODELS, CLASSES, None)}
    ]
    journal, store = run_virtual(live(lambda line: lines.append(dict(line))))

    same = simulated(journal)

    assert same.ends == journal.ends
    assert same.decisions == journal.decisions[: len(same.decisions)]
    assert len(same.decisions) >= 10
    assert sum(end[-1] for end in journal.ends) > 0, "batch work was interrupted"
    assert sorted(each.ok for each in store.ended) == [True] * 180, "and each item has one result"

    again = replay(orjson.loads(orjson.dumps(line)) for line in lines)
    assert again.difference == "", "and a replay of what was told is the same"
    assert again.decisions == len(journal.decisions)
