"""Items of a batch count against the limits of the key that made it: they wait for them, and fail of nothing."""

from __future__ import annotations

from pathlib import Path

from batch_runner_site import Site, many, run
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key
from gateway_site import hashed, line


def ring(**limits: float) -> KeyRing:
    return KeyRing([Key(name="team", hash=hashed("sk-team"), **limits), Key(name="other", hash=hashed("sk-other"))])


def test_items_wait_for_their_keys_requests_per_minute(tmp_path: Path) -> None:
    async def test() -> None:
        site = await Site(tmp_path, keys=ring(requests_per_minute=60.0)).start()
        team = await site.submit(*many(100), owner="team")
        await site.until(lambda: len(site.plane.submitted) >= 30)
        # Half a minute's worth is left for what cannot wait.
        assert site.clock.now_s < 5.0
        assert len(site.plane.submitted) <= 30 + site.clock.now_s + 1
        other = await site.submit(*many(20), owner="other")
        assert (await site.ended(other)).completed == 20
        assert site.clock.now_s < 20.0
        done = await site.ended(team, step_s=1.0)
        assert (done.status, done.completed, done.failed) == ("completed", 100, 0)
        assert site.clock.now_s >= 68.0
        assert len(site.plane.submitted) == 120
        await site.stop()

    run(test)


def test_items_wait_for_their_keys_tokens_per_minute_prompts_and_answers(tmp_path: Path) -> None:
    async def test() -> None:
        site = await Site(tmp_path, lambda text: "a " * 100, keys=ring(tokens_per_minute=6000.0)).start()
        tools = [{"type": "function", "function": {"name": "f", "description": "word " * 800}}]
        team = await site.submit(*(line(str(i), "x", tools=tools) for i in range(12)), owner="team")
        await site.until(lambda: site.plane.submitted)
        # A thousand tokens of tools each, and then the answer's hundred.
        assert len(site.plane.submitted) <= 3
        done = await site.ended(team, step_s=1.0)
        assert (done.status, done.completed) == ("completed", 12)
        spent = 12 * 971 + 11 * 100  # A prompt counts for 971 tokens; the last answer is paid for afterwards.
        assert site.clock.now_s >= (spent - 3000) / 100
        await site.stop()

    run(test)


def test_interactive_requests_of_the_key_come_first(tmp_path: Path) -> None:
    async def test() -> None:
        keys = ring(requests_per_minute=60.0)
        site = await Site(tmp_path, keys=keys).start()
        await site.submit(*many(500), owner="team")
        await site.until(lambda: site.runner.summary()["held_by_key_limits"])
        key = keys.named("team")
        assert key is not None
        for _ in range(29):  # Raises once nothing is left.
            keys.take(key, site.clock.now_s)
        await site.stop()

    run(test)


def test_what_is_taken_back_unrun_is_not_paid_for_and_goes_with_its_batch(tmp_path: Path) -> None:
    async def test() -> None:
        keys = ring(requests_per_minute=60.0)
        site = await Site(tmp_path, lambda text: None, keys=keys).start()
        batch = await site.submit(*many(200), owner="team")
        await site.until(lambda: site.runner.summary()["held_by_key_limits"])
        assert site.plane.held_items == 0, "nothing is planned for that no key pays for"
        await site.runner.cancel(batch.id, None)
        done = await site.ended(batch)
        assert (done.status, done.completed) == ("cancelled", 0)
        assert site.runner.summary()["held_by_key_limits"] == 0
        key = keys.named("team")
        assert key is not None
        for _ in range(60):
            keys.take(key, site.clock.now_s)
        await site.stop()

    run(test)
