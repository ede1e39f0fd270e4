"""Law 11 over the gateway's real path: bytes in, bytes out, with emulated engines under virtual time.

Among real requests come some that their engine refuses at once: every decision that the gateway takes is the one that
it takes for the real ones alone, to the last bit. Others are taken back by clients that hang up once they have asked.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from chiron.core.types import Decision, Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.engines.profile import Profile
from chiron.fleet.model import ColdStart
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.registry import make_policy
from effort import examples
from live_plane_factory import PROFILE
from real_path import Client, Site, completion
from virtual_loop import run_virtual

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=60.0, itl_s=0.1)
ROOMY = replace(PROFILE, f_ms_per_token=0.5, kv_capacity_tokens=100_000, max_num_seqs=64, max_num_batched_tokens=2048)
REFUSED = 3_000
"""A prompt of this many tokens asks for more output than any instance can hold."""
SECONDS = 60


@dataclass(frozen=True)
class Asked:
    at_s: float
    tokens: int = 30
    stream: bool = True
    leaves: bool = False

    @property
    def runs(self) -> bool:
        return self.tokens < REFUSED and not self.leaves

    def bytes(self) -> bytes:
        """Of a request whose answer is of a length by its prompt's; one that is refused wants more than there is."""
        tokens = 5 + self.tokens % 15 if self.tokens < REFUSED else 10**7
        return completion(
            {
                "model": "m0",
                "prompt": [7] * self.tokens,
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": self.stream,
            }
        )


class Journal:
    wants_events = False

    def __init__(self) -> None:
        self.decisions: list[str] = []
        self.outcomes: list[str] = []

    def decided(self, now_s: float, decision: Decision) -> None:
        if decision.kind != "reject":
            self.decisions.append(repr((now_s, decision)))

    def ended(self, request: Request) -> None:
        assert request.outcome is not None
        self.outcomes.append(request.outcome)

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None: ...


async def answered(asked: list[Asked]) -> tuple[Journal, dict[str, Any], list[Client]]:
    loop, journal = asyncio.get_running_loop(), Journal()
    site = Site(
        models=[ModelSpec(name="m0", kinds=(_kind(ROOMY),), min_instances=1, max_instances=20)],
        classes=[CHAT],
        profiles={"small": ROOMY},
        policy=make_policy("chiron", ChironSettings(prior_s=10, hold_s=10.0, headroom_prior=3.0)),
        journal=journal,
        cold_start=ColdStart(node_start_s=0.0, model_load_s=10.0, warm_load_s=10.0, warm_for_s=0.0, jitter=0.0),
    )
    site.begin({"m0": 6})
    clients = []

    def connect(each: Asked, client: Client) -> None:
        site.ask(client, each.bytes())
        if each.leaves:
            client.transport.abort()

    for each in sorted(asked, key=lambda each: (each.at_s, not each.runs)):
        clients.append(client := Client())
        # Those of one moment come in this order: asyncio keeps none among equal timers.
        loop.call_at(each.at_s + len(clients) * 1e-9, connect, each, client)
    while len(journal.outcomes) < len(asked):
        await asyncio.sleep(1.0)
    await asyncio.sleep(SECONDS + 30 - loop.time())
    plane = site.gateway.plane
    learner = plane.models["m0"].learner
    known = {
        "mix": learner.mixes["chat"].view(),
        "step times": learner.step_times,
        "counts": plane.fleet_state["m0"].history.counts.tolist(),  # type: ignore[index]
        "limits": [(i.id, i.max_batch_size, i.prefill_limit_s) for i in plane.instances.values()],
    }
    await site.close()
    return journal, known, clients


def _kind(profile: Profile) -> InstanceKind:
    return InstanceKind(
        name="small",
        gpu="g",
        gpus=1,
        price_per_gpu_hour=1.0,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
    )


# A third of a minute of three times as much between two quiet ones.
REALS = [
    Asked(at_s=second + n / rate, tokens=150 + 37 * (second + n) % 50, stream=n % 3 > 0)
    for second in range(SECONDS)
    for rate in ((9 if second // 20 == 1 else 3),)
    for n in range(rate)
]

moments = st.integers(1, 4 * SECONDS - 8).map(lambda quarter: quarter / 4.0 + 0.1)
refused = st.builds(Asked, at_s=moments, tokens=st.integers(REFUSED, 3 * REFUSED), stream=st.booleans())
taken_back = st.builds(Asked, at_s=moments, tokens=st.integers(1, 500), stream=st.booleans(), leaves=st.just(True))


@settings(max_examples=examples(6), deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.lists(refused, min_size=1, max_size=20))
def test_what_engines_refuse_changes_no_decision_of_the_gateway(never: list[Asked]) -> None:
    journal, known, _ = run_virtual(answered(REALS + never))

    assert journal.outcomes.count("finished") == len(REALS)
    assert journal.outcomes.count("rejected") == len(never)
    assert journal.decisions == alone()[0]
    assert known == alone()[1]


@settings(max_examples=examples(6), deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.lists(taken_back, min_size=1, max_size=10))
def test_what_clients_take_back_is_forgotten(never: list[Asked]) -> None:
    """An engine may have begun with it, and who ran beside it took a step longer: that is not undone. All that the
    gateway counted is."""
    journal, known, _ = run_virtual(answered(REALS + never))

    assert journal.outcomes.count("finished") == len(REALS)
    assert journal.outcomes.count("cancelled") == len(never)
    before = alone()[1]
    assert known["counts"] == before["counts"]
    assert known["mix"].finished == before["mix"].finished
    assert known["mix"].input_tokens == pytest.approx(before["mix"].input_tokens, rel=1e-6)
    assert known["mix"].output_tokens == pytest.approx(before["mix"].output_tokens, rel=1e-2)
    assert known["step times"].fixed_s == pytest.approx(before["step times"].fixed_s, rel=0.05)
    assert [number for number, *_ in known["limits"]] == [number for number, *_ in before["limits"]]


_alone: list[tuple[list[str], dict[str, Any]]] = []


def alone() -> tuple[list[str], dict[str, Any]]:
    """The decisions for the real ones alone, and what is known at the end."""
    if not _alone:
        journal, known, _ = run_virtual(answered(REALS))
        assert len(journal.decisions) > 3, "there is something to change"
        _alone.append((journal.decisions, known))
    return _alone[0]
