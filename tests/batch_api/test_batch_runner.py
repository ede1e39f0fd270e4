"""The batch runner on the real store, before a fake control plane, under virtual time."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_runner_site import Site, many, run
from chiron.gateway.batch.lines import line_check
from chiron.gateway.batch.settings import RunnerSettings
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.key_ring import KeyRing
from chiron.gateway.relay.keys import Key
from chiron.gateway.settings import BatchSettings
from chiron.store.port import StoreFull
from chiron.store.sqlite.store import SqliteStore
from gateway_site import hashed, line, models, prompt, served


def test_the_window_bounds_what_is_out_and_the_rest_is_told_as_a_sum(tmp_path: Path) -> None:
    async def test() -> None:
        gate = {"open": False}
        settings = BatchSettings(window_max=32)
        site = Site(tmp_path, lambda text: text if gate["open"] else None, settings=settings)
        await site.start()
        batch = await site.submit(*many(500))
        await site.until(lambda: len(site.plane.open) == 32)
        assert site.plane.held_items == 468
        (model, deadline_s), sums = next(iter(site.plane.held.items()))
        assert model == "m"
        assert abs(deadline_s - 3600.0) < 1.0
        assert sums[1] > 468 * 2
        assert sums[2] > sums[1]
        gate["open"] = True
        for request in list(site.plane.open.values()):
            site.plane.settle(request)
        done = await site.ended(batch)
        assert (done.completed, done.failed) == (500, 0)
        assert site.plane.most_open <= 32
        assert site.plane.held_items == 0
        assert all(abs(value) < 1e-6 for sums in site.plane.held.values() for value in sums)
        assert [each["custom_id"] for each in await site.lines(done.output_file_id)] == [str(i) for i in range(500)]
        await site.stop()

    run(test)


def test_the_window_bounds_the_bytes_that_are_out(tmp_path: Path) -> None:
    async def test() -> None:
        gate = {"open": False}
        tuning = RunnerSettings(finish_wait_s=0.001, window_bytes_max=50_000)
        site = await Site(tmp_path, lambda text: text if gate["open"] else None, tuning=tuning).start()
        late = await site.submit(*many(40, "x" * 10_000), window_s=7200.0)
        await site.until(lambda: len(site.plane.open) == 5)
        await site.until(lambda: site.plane.held_items == 35)
        early = await site.submit(*many(40, "y" * 10_000, "y"))
        await site.until(lambda: len([text for text in site.plane.submitted if text[0] == "y"]) >= 5)
        before_s = site.clock.now_s
        await site.until(lambda: site.clock.now_s > before_s + 10.0, step_s=0.5)
        assert {text[0] for text in map(prompt, site.plane.open.values())} == {"y"}
        assert site.plane.most_open <= 15
        gate["open"] = True
        for request in list(site.plane.open.values()):
            site.plane.settle(request)
        assert (await site.ended(early)).completed == 40
        assert (await site.ended(late)).completed == 40
        assert site.plane.most_open <= 15
        await site.stop()

    run(test)


def test_requests_carry_class_deadline_and_limits(tmp_path: Path) -> None:
    async def test() -> None:
        site = await Site(tmp_path, lambda text: None).start()
        await site.submit(line("a", "four char " * 100, max_tokens=7), window_s=600.0)
        await site.until(lambda: site.plane.open)
        request = next(iter(site.plane.open.values()))
        assert request.cls.name == "batch"
        assert abs(request.deadline_s - 600.0) < 1.0
        assert request.max_output_tokens == 7
        assert 240 < request.input_tokens < 260
        assert request.payload.request_id.startswith("batch_req_")
        await site.stop()

    run(test)


def test_work_with_an_earlier_deadline_goes_first_and_later_work_goes_back(tmp_path: Path) -> None:
    async def test() -> None:
        site = await Site(tmp_path, lambda text: None, settings=BatchSettings(window_max=8)).start()
        await site.submit(*many(50, "late"), window_s=86_400.0)
        await site.until(lambda: len(site.plane.open) == 8)
        await site.submit(*many(4, "urgent"), window_s=600.0)
        await site.until(lambda: sum("urgent" in each for each in site.plane.submitted) == 4)
        assert len(site.plane.open) <= 8
        await site.until(lambda: site.plane.held_items == 46)
        await site.stop()

    run(test)


def test_an_item_beyond_every_context_is_answered_without_an_engine(tmp_path: Path) -> None:
    async def test() -> None:
        site = Site(tmp_path)
        site.models.by_name["m"].context_tokens = 2048
        await site.start()
        batch = await site.submit(line("long", "x" * 100_000), *many(3))
        done = await site.ended(batch)
        assert (done.completed, done.failed) == (3, 1)
        (error,) = await site.lines(done.error_file_id)
        assert error["custom_id"] == "long"
        assert error["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 2048 tokens" in error["error"]["message"]
        await site.stop()

    run(test)


def test_a_poison_item_fails_alone(tmp_path: Path) -> None:
    async def test() -> None:
        """Whoever is submitted together with the poison dies with it, as neighbours on one engine do."""
        site = Site(tmp_path, lambda text: None, settings=BatchSettings(window_max=16))
        await site.start()
        batch = await site.submit(*many(11), line("poison", "poison"), *many(11, prefix="n"))
        crashes = 0

        def engine() -> None:
            nonlocal crashes
            running = list(site.plane.open.values())
            for request in running:
                request.instance = SimpleNamespace()  # type: ignore[assignment]
            if any("poison" in text(each) for each in running):
                crashes += 1
                for request in running:
                    site.plane.end(request, "failed")
            elif running:
                site.plane.answer = str.upper
                for request in running:
                    site.plane.settle(request)
                site.plane.answer = lambda text: None
            site.clock.call_later(0.5, engine)

        engine()
        done = await site.ended(batch)
        assert (done.completed, done.failed) == (22, 1)
        assert crashes <= 4
        (error,) = await site.lines(done.error_file_id)
        assert error["custom_id"] == "poison"
        assert error["error"]["code"] == "request_failed"
        assert site.runner.summary()["suspects"] == 0
        await site.stop()

    def text(request: Any) -> str:
        return str(json.loads(request.payload._body.raw)["messages"][0]["content"])

    run(test)


def test_work_of_a_model_that_the_config_lost_is_told_of_and_done_when_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        first = await Site(tmp_path, lambda text: None).start()
        batch = await first.submit(*many(5))
        await first.until(lambda: first.plane.submitted)
        assert first.runner.summary()["unserved"] == {}
        await first.stop()
        second = await Site(tmp_path, models=Models({"other": served("other")})).start()
        await second.until(lambda: second.runner.summary()["unserved"] == {"m": 5})
        await second.stop()
        third = await Site(tmp_path).start()
        done = await third.ended(batch)
        assert (done.completed, done.failed) == (5, 0)
        assert third.runner.summary()["unserved"] == {}
        await third.stop()
        assert [r.message for r in caplog.records if "bring it back" in r.message] == [
            f"{batch.id} waits for model 'm', which the config does not have: bring it back, give another model this "
            "name as an alias, or cancel the batch"
        ]

    run(test)


def test_engines_that_fail_everything_are_asked_less_and_less(tmp_path: Path) -> None:
    async def test() -> None:
        broken = {"now": True}
        tuning = RunnerSettings(finish_wait_s=0.001, attempts_max=50)
        site = Site(tmp_path, lambda text: "failed" if broken["now"] else text, tuning=tuning)
        await site.start()
        batch = await site.submit(*many(40))
        await site.until(lambda: site.runner.summary()["failing_models"] == ["m"])
        at_first = len(site.plane.submitted)
        assert at_first <= 41
        start_s = site.clock.now_s
        await site.until(lambda: site.clock.now_s > start_s + 120.0, step_s=0.5)
        assert len(site.plane.submitted) - at_first < 20
        broken["now"] = False
        done = await site.ended(batch)
        assert (done.completed, done.failed) == (40, 0)
        assert site.runner.summary()["failing_models"] == []
        await site.stop()

    run(test)


class FullStore(SqliteStore):
    """Has no room for results while ``full``."""

    full = False

    async def finish(self, ended: Any, now_s: float) -> None:
        if self.full:
            raise StoreFull("no space left on device")
        await super().finish(ended, now_s)


def test_a_full_disk_pauses_and_loses_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        site = Site(tmp_path, store=FullStore, settings=BatchSettings(window_max=16))
        site.store.full = True
        await site.start()
        batch = await site.submit(*many(100))
        await site.until(lambda: "no space left" in str(site.runner.summary()["paused"]))
        submitted = len(site.plane.submitted)
        start_s = site.clock.now_s
        await site.until(lambda: site.clock.now_s > start_s + 60.0, step_s=0.5)
        assert len(site.plane.submitted) <= submitted + 16
        site.store.full = False
        done = await site.ended(batch)
        assert (done.completed, done.failed) == (100, 0)
        assert max(Counter(site.plane.submitted).values()) == 1
        assert site.runner.paused == ""
        await site.stop()

    run(test)


def test_expiry_stops_what_runs_and_keeps_what_is_done(tmp_path: Path) -> None:
    async def test() -> None:
        site = await Site(tmp_path, lambda text: text if "quick" in text else None).start()
        batch = await site.submit(*many(3, "quick"), *many(3, "slow", "s"), window_s=60.0)
        await site.until(lambda: len(site.plane.open) == 3)
        done = await site.ended(batch, step_s=0.5)
        assert done.status == "expired"
        assert 60.0 <= (done.expired_s or 0.0) - done.created_s < 120.0
        assert (done.completed, done.failed) == (3, 3)
        assert not site.plane.open
        assert {each["error"]["code"] for each in await site.lines(done.error_file_id)} == {"batch_expired"}
        await site.stop()

    run(test)


def test_cancelling_stops_what_runs_also_what_is_just_being_leased(tmp_path: Path) -> None:
    async def test() -> None:
        site = await Site(tmp_path, lambda text: None, settings=BatchSettings(window_max=8)).start()
        batch = await site.submit(*many(30))
        other = await site.submit(line("other", "other"))
        await site.until(lambda: len(site.plane.open) == 8)
        await site.runner.cancel(batch.id, None)
        done = await site.ended(batch)
        assert (done.status, done.failed) == ("cancelled", 30)
        await site.until(lambda: site.plane.submitted[-1] == "other")
        await site.until(lambda: len(site.plane.open) == 1)
        site.plane.answer = str.upper
        site.plane.settle(next(iter(site.plane.open.values())))
        assert (await site.ended(other)).status == "completed"
        await site.stop()

    run(test)


def test_a_restart_takes_up_what_was_left(tmp_path: Path) -> None:
    async def test() -> None:
        first = await Site(tmp_path, lambda text: text if int(text.split()[1]) < 5 else None).start()
        batch = await first.submit(*many(20))
        await first.until(lambda: len(first.plane.open) == 15)
        waiting = await first.upload(*many(3))
        await first.stop()  # ``waiting`` was accepted, and nobody has looked at it.
        second = await Site(tmp_path).start()
        assert (await second.ended(batch)).completed == 20
        assert (await second.ended(waiting)).completed == 3
        assert Counter(second.plane.submitted)["x 4"] == 0  # Done before.
        assert Counter(second.plane.submitted)["x 5"] == 1
        await second.stop()

    run(test)


def test_the_log_says_what_goes_on_and_how_each_batch_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "chiron.batch")

    def said(text: str) -> list[str]:
        return [message for message in caplog.messages if text in message]

    async def test() -> None:
        first = await Site(tmp_path, lambda text: text if int(text.split()[1]) < 5 else None).start()
        batch = await first.submit(*many(20))
        await first.until(lambda: len(first.plane.open) == 15)
        waiting = await first.upload(*many(3))
        await first.stop()
        assert not said(" ended: ")
        second = await Site(tmp_path).start()
        assert said(f"batch {batch.id} continues: 15 items left, due in ")
        assert said(f"batch {waiting.id} continues: its input is validated again")
        await second.until(lambda: len(said(" ended: ")) == 2)
        assert len(said(f"batch {batch.id} ended: completed after ")) == 1
        assert said("20 of 20 items done, 0 failed")
        held = await Site(tmp_path / "other", lambda text: None).start()
        late = await held.submit(*many(2), window_s=5.0)
        called_off = await held.submit(*many(2))
        await held.until(lambda: len(held.plane.open) == 4)
        await held.runner.cancel(called_off.id, None)
        await held.until(lambda: len(said(" ended: ")) == 4)
        assert said(f"batch {late.id} ended: expired after ")
        assert said(f"batch {called_off.id} ended: cancelled after ")
        for site in (second, held):
            await site.stop()

    run(test)


def test_items_of_a_model_that_was_renamed_run_under_its_alias(tmp_path: Path) -> None:
    async def test() -> None:
        first = await Site(tmp_path, lambda text: None).start()
        batch = await first.submit(*many(20))
        await first.until(lambda: len(first.plane.open) == 20)
        await first.stop()
        renamed = Models({"new": served("new", aliases=("m",)), "org/n": served("org/n")})
        second = await Site(tmp_path, models=renamed, settings=BatchSettings(window_max=8)).start()
        later = await second.submit(*(line(f"{i}", model="new") for i in range(20)))
        assert (await second.ended(batch)).completed == 20
        assert (await second.ended(later)).completed == 20
        assert {model for model, _ in second.plane.held} == {"new"}
        assert second.plane.held_items == 0
        await second.stop()

    run(test)


def test_answers_cut_off_are_tried_again_and_refusals_are_answers(tmp_path: Path) -> None:
    async def test() -> None:
        tries: Counter[str] = Counter()
        half = b'data: {"choices": [{"index": 0, "delta": {"content": "ha"}}]}\n\n'
        refusal = b'data: {"error": {"message": "too hot", "code": 400}}\n\n'

        def answer(text: str) -> Any:
            tries[text] += 1
            if text == "cut":
                return (200, half) if tries[text] < 2 else "ok"
            no = {"no": (422, b"not json"), "late no": (200, refusal), "never": (501, b"not built for that")}
            return no.get(text, text)

        site = await Site(tmp_path, answer).start()
        done = await site.ended(
            await site.submit(line("a", "cut"), line("b", "no"), line("c", "late no"), line("d", "never"))
        )
        assert (done.completed, done.failed) == (1, 3)
        assert (await site.lines(done.output_file_id))[0]["response"]["body"]["choices"][0]["message"][
            "content"
        ] == "ok"
        no, late, never = await site.lines(done.error_file_id)
        assert no["response"]["status_code"] == 422
        assert no["response"]["body"]["error"]["message"] == "not json"
        assert late["response"]["status_code"] == 400
        assert late["response"]["body"]["error"]["message"] == "too hot"
        assert never["response"]["status_code"] == 501
        assert never["response"]["body"]["error"]["message"] == "not built for that"
        assert tries == {"cut": 2, "no": 1, "late no": 1, "never": 1}
        await site.stop()

    run(test)


def test_an_answer_that_cannot_be_written_down_fails_alone(tmp_path: Path) -> None:
    async def test() -> None:
        deep = b"[" * 600 + b"]" * 600
        refusal = (422, b'{"error": {"message": "no", "input": %b}}' % deep)
        site = await Site(tmp_path, lambda text: refusal if text == "no" else text).start()
        done = await site.ended(await site.submit(line("a", "no"), line("b", "yes")))
        assert (done.completed, done.failed) == (1, 1)
        (error,) = await site.lines(done.error_file_id)
        assert (error["custom_id"], error["error"]["code"]) == ("a", "request_failed")
        await site.stop()

    run(test)


def test_lines_that_the_disk_has_changed_fail_alone(tmp_path: Path) -> None:
    async def test() -> None:
        settings = BatchSettings(window_max=2)
        site = await Site(tmp_path, lambda text: None if text.startswith("x") else text, settings=settings).start()
        first = await site.submit(*many(2))
        batch = await site.submit(line("a", "one"), line("b", "two"), line("c", "three"))
        await site.until(lambda: site.plane.held_items == 3)
        path = tmp_path / "files" / batch.input_file_id
        path.write_bytes(path.read_bytes().replace(b'{"custom_id": "b", "', b'["custom_id": "b", "'))
        await site.runner.cancel(first.id, None)
        done = await site.ended(batch)
        assert (done.status, done.completed, done.failed) == ("completed", 2, 1)
        (error,) = await site.lines(done.error_file_id)
        assert (error["custom_id"], error["error"]["code"]) == ("b", "input_damaged")
        assert batch.input_file_id in error["error"]["message"]
        await site.stop()

    run(test)


def unreadable(path: Path) -> None:
    """In one step, as threads of the store may look at any moment: a file that is not there is a lost one."""
    spare = path.with_suffix(".spare")
    spare.symlink_to(path.name)
    spare.replace(path)


def readable(path: Path, content: bytes) -> None:
    spare = path.with_suffix(".spare")
    spare.write_bytes(content)
    spare.replace(path)


def test_a_file_that_cannot_be_read_holds_up_no_other_model(tmp_path: Path) -> None:
    async def test() -> None:
        gate = {"open": False}
        settings = BatchSettings(window_max=2)
        site = await Site(tmp_path, lambda text: text if gate["open"] else None, settings=settings).start()
        bad = await site.submit(*(line(f"{i}", model="org/n") for i in range(4)))
        good = await site.submit(*many(40))
        await site.until(lambda: len(site.plane.open) == 4)
        path = tmp_path / "files" / bad.input_file_id
        content = path.read_bytes()
        unreadable(path)
        gate["open"] = True
        for request in list(site.plane.open.values()):
            site.plane.settle(request)
        assert (await site.ended(good)).completed == 40
        assert (await site.store.get_batch(bad.id, None)).completed == 2
        readable(path, content)
        assert (await site.ended(bad, step_s=1.0)).completed == 4
        await site.stop()

    run(test)


def test_a_file_that_cannot_be_read_holds_up_no_other_validation(tmp_path: Path) -> None:
    async def test() -> None:
        site = await Site(tmp_path).start()
        bad = [await site.upload(line("a")) for _ in range(3)]
        paths = [tmp_path / "files" / batch.input_file_id for batch in bad]
        content = paths[0].read_bytes()
        for batch, path in zip(bad, paths, strict=True):
            unreadable(path)
            site.runner.created(batch)
        assert (await site.ended(await site.submit(line("b")))).completed == 1
        for batch, path in zip(bad, paths, strict=True):
            assert (await site.store.get_batch(batch.id, None)).status == "validating"
            readable(path, content)
            assert (await site.ended(batch, step_s=1.0)).completed == 1
        await site.stop()

    run(test)


def test_many_small_messages_in_a_long_line_are_an_item(tmp_path: Path) -> None:
    """Each counts for a few tokens of its own, so that the prompt is taken to be longer than the line."""

    async def test() -> None:
        settings = BatchSettings(line_max_bytes=4000)
        site = await Site(tmp_path, settings=settings).start()
        messages = [{"role": "user", "content": "hello"}, *({} for _ in range(900)), {"content": "hello"}]
        assert (await site.ended(await site.submit(line("a", messages=messages)))).completed == 1
        await site.stop()

    run(test)


def test_a_key_that_is_gone_fails_its_batch_with_the_reason(tmp_path: Path) -> None:
    async def test() -> None:
        key = Key(name="team", hash=hashed("sk-team"))
        site = await Site(tmp_path, keys=KeyRing([key])).start()
        assert (await site.ended(await site.submit(line("a"), owner="team"))).status == "completed"
        failed = await site.ended(await site.submit(line("a"), owner="former"))
        assert failed.status == "failed"
        assert failed.errors[0].code == "permission_denied"
        await site.stop()

    run(test)


def test_lines_nested_without_end_are_refused_or_counted() -> None:
    names = {name: served.settings for name, served in models().by_name.items()}
    check = line_check("/v1/completions", names, Key(name="a"))
    deep = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m","prompt":%b1%b}}'
    for depth in (5, 500, 100_000):
        assert check(deep % (b"[" * depth, b"]" * depth)) is not None
