"""``chiron replay`` of a file that is no input log any more: one short error that says where, and no traceback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from chiron.cli import app
from chiron.control.learned import Learned
from chiron.core.errors import InputError
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import Instance, Request, RequestClass, Sample
from chiron.runtime.input_lines import ARGUMENTS, ReplayError, checked
from chiron.runtime.input_log import SAMPLE_FIELDS, MarkedClock, Point, RecordedInputs
from chiron.runtime.replay import replay
from chiron.telemetry.event_log import summed
from scenario_factory import PROFILE, kind_of
from scripted_engine import CHAT, Reader, ScriptedEngine, before, body, whole

Line = dict[str, Any]
DEEP = 1_000


async def served(directory: Path) -> None:
    async with before(directory, ScriptedEngine(whole), changes=["telemetry.input_log=inputs.jsonl"]) as (_, origin):
        for _ in range(2):
            await Reader(origin, body(), CHAT).end()


SAMPLE = [1, 0.01, *(0 for _ in SAMPLE_FIELDS[2:])]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    directory = tmp_path_factory.mktemp("served")
    asyncio.run(served(directory))
    lines = [json.loads(line) for line in (directory / "inputs.jsonl").read_text().splitlines()]
    lines.append({**lines[-1], "event": "in", "k": "sampled", "n": 0, "d": 0, "a": [[SAMPLE]]})
    return [{name: value for name, value in line.items() if name != "sum"} for line in lines]


def at(kind: str, place: int | str, value: object) -> Callable[[Line], Line | None]:
    """A field of the first line of that kind, or one of its arguments, in place of what it was."""

    def change(line: Line) -> Line | None:
        if line.get("k") != kind:
            return None
        if isinstance(place, str):
            return {**line, place: value}
        return {**line, "a": [value if i == place else told for i, told in enumerate(line["a"])]}

    return change


def arguments(kind: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Line], Line | None]:
    return lambda line: {**line, "a": change(line["a"])} if line.get("k") == kind else None


HOSTILE: dict[str, tuple[Callable[[Line], Line | None], str]] = {
    "a time that is no number": (at("submit", "t", float("nan")), "a line of NaN s"),
    "a time that goes back": (at("first_token", "t", 0.0), "times never go back"),
    "a time before all": (at("submit", "t", -1.0), "a line of -1.0 s"),
    "a time after all": (at("submit", "t", 1e308), "a line of 1e+308 s"),
    "an endless time": (at("submit", "t", float("inf")), "a line of Infinity s"),
    "a time of 400 digits": (at("submit", "t", 10**400), "a line of 1000"),
    "timers that never fired": (at("submit", "n", 2**70), "made nothing of the kind"),
    "a count of timers that is text": (at("submit", "n", "7"), "Expected `int`, got `str` - at `$.n`"),
    "a depth that is none": (at("submit", "d", None), "Expected `int`, got `null` - at `$.d`"),
    "an unknown kind": (at("submit", "k", "sumbit"), "input 'sumbit' is unknown"),
    "a method that is no input": (at("submit", "k", "told"), "input 'told' is unknown"),
    "a kind that is a list": (at("submit", "k", ["submit"]), "Expected `str`, got `array` - at `$.k`"),
    "a kind of 16 MiB": (at("submit", "k", "k" * 2**24), "kkk... is unknown"),
    "no arguments": (at("submit", "a", None), "Expected `array`, got `null` - at `$.a`"),
    "too few arguments": (arguments("submit", lambda a: a[:-1]), "Expected `array` of length 14"),
    "too many arguments": (arguments("finished", lambda a: [*a, 1]), "Expected `array` of length 5"),
    "an argument nested deep": (at("submit", 1, json.loads("[" * 300 + "]" * 300)), "Expected `str`, got `array`"),
    "a tenant of 16 MiB": (at("submit", 9, "x" * 2**24), "All of them are those of the log"),
    "a prompt of a negative length": (at("submit", 4, -5), "Expected `int` >= 0 - at `$[4]`"),
    "a prompt of half a token": (at("submit", 4, 7.5), "Expected `int`, got `float` - at `$[4]`"),
    "a truth for a number": (at("submit", 4, True), "Expected `int`, got `bool` - at `$[4]`"),
    "a prompt of 2^62 tokens": (at("submit", 4, 2**62), "Expected `int` <= 9007199254740992 - at `$[4]`"),
    "an arrival at no time": (at("submit", 3, float("nan")), "Expected `float` >= -100000000000.0 - at `$[3]`"),
    "a class of an unknown sort": (
        at("submit", 2, ["chat", "urgent", 2.0, 0.1, None, 1.0]),
        "Invalid enum value 'urgent' - at `$[2][1]`",
    ),
    "a class of negative weight": (
        at("submit", 2, ["chat", "interactive", 2.0, 0.1, None, -1.0]),
        "Expected `float` > 0.0 - at `$[2][5]`",
    ),
    "a class of no time": (
        at("submit", 2, ["chat", "interactive", 0.0, 0.1, None, 1.0]),
        "Expected `float` > 0.0 - at `$[2][2]`",
    ),
    "half a character": (at("submit", 9, "\ud83e"), "Expected `str` matching regex"),
    "an unknown model": (at("submit", 1, "m" * 2**16), "of which the replay knows nothing"),
    "an unknown request": (at("finished", 0, 77), "of which the replay knows nothing: '77'"),
    "negative tokens": (at("finished", 1, -7), "Expected `int` >= 0 - at `$[1]`"),
    "an unknown instance": (at("instance_ready", 0, 77), "of which the replay knows nothing: '77'"),
    "2^60 instances": (at("begin", 0, {"m": 2**60}), "Expected `int` <= 1000000 - at `$[0][...]`"),
    "a sample of half the fields": (at("sampled", 0, [SAMPLE[:6]]), "Expected `array` of length >= 13"),
    "a sample of 2^62 steps": (at("sampled", 0, [[*SAMPLE[:8], 2**62, *SAMPLE[9:]]]), "Expected `int` <= "),
    "a sample that is no number": (at("sampled", 0, [[*SAMPLE[:8], float("nan"), *SAMPLE[9:]]]), "Expected `float` "),
    "an output that is nested deep": (
        at("dispatch", "a", json.loads("[" * 900 + "]" * 900)),
        "the replay made",
    ),
}


def changed(log: list[Line], change: Callable[[Line], Line | None]) -> list[Line]:
    """With the first line changed that ``change`` changes."""
    place, line = next((i, found) for i, found in enumerate(map(change, log)) if found is not None)
    return [*log[:place], line, *log[place + 1 :]]


def call(file: Path, lines: list[bytes]) -> str:
    file.write_bytes(b"".join(summed(line + b"\n") for line in lines))
    done = CliRunner().invoke(app, ["replay", str(file)])
    said = done.output + done.stderr
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert len(said) < 2_000
    assert (done.exit_code == 0) == ("All of them" in said), said
    return said


@pytest.mark.parametrize("name", HOSTILE)
def test_a_line_that_no_gateway_writes_is_refused(name: str, log: list[Line], tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    said = call(tmp_path / "log", [json.dumps(line).encode() for line in changed(log, change)])
    assert message in " ".join(said.split()), said


def test_what_is_no_line_is_refused(log: list[Line], tmp_path: Path) -> None:
    lines = [json.dumps(line).encode() for line in log]
    for spoilt, message in (
        (b"[" * DEEP * 100 + b"]" * DEEP * 100, "line 7 is not an event"),
        (b'{"t":1,"event":"in","k":"start","n":0,"d":0,"a":[' + b"[" * DEEP * 5 + b"]" * DEEP * 5 + b"]}", "recursion"),
        (b'{"t":1e999,"event":"in"}', "a line of Infinity s"),
        (b'{"t":' + b"1" * 10_000 + b',"event":"in"}', "line 7 is not an event"),
    ):
        assert message in " ".join(call(tmp_path / "log", [*lines[:6], spoilt, *lines[6:]]).split())


def test_a_head_that_is_nested_deep_is_no_head(log: list[Line], tmp_path: Path) -> None:
    lines = [json.dumps({**log[0], "replay": "[" * 100_000}), *map(json.dumps, log[1:])]
    assert "this is no input log" in call(tmp_path / "log", [line.encode() for line in lines])


def test_years_without_a_line_are_refused(log: list[Line]) -> None:
    def years(line: Line) -> Line | None:
        return {**line, "t": 9e8, "n": 2**53} if line.get("k") == "submit" else None

    with pytest.raises(ReplayError, match="200 timers fired before"):
        replay(changed(log, years), idle_timers_max=200)


VALUES = (-1, 0, 1, 2, 2**53, 1e300, -0.5, 0.5, None, True, "", "m", [], {}, {"m": 3}, [[1, 7, 0.4, 0, -1]])


def test_whatever_else_stands_there_is_a_difference_or_an_error(log: list[Line]) -> None:
    """Lines that change places, come twice, are missing or say something else: nothing else is raised."""
    kinds = list(ARGUMENTS)
    for seed in range(200):
        draw = Random(f"replay:{seed}")
        lines: list[Line] = json.loads(json.dumps(log))
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(2, len(lines))
            line = lines[place]
            what = draw.randrange(5)
            if what == 0:
                lines.insert(draw.randrange(2, len(lines)), dict(line))
            elif what == 1:
                del lines[place]
            elif what == 2:
                line["k"] = draw.choice(kinds)
            elif line["a"]:
                line["a"][draw.randrange(len(line["a"]))] = draw.choice(VALUES)
        try:
            replay(lines, idle_timers_max=200)
        except InputError:
            continue
        except Exception as error:
            raise AssertionError(f"{seed}: {[json.dumps(line) for line in lines[1:]]}") from error


class Told:
    """A control plane that hears everything and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *about, **named: []


def test_whatever_a_gateway_writes_is_taken() -> None:
    """Each kind of input, with the most unlikely values that an engine, a client or a config may give."""
    lines: list[Line] = []
    point = Point()
    inputs = RecordedInputs(
        clock=MarkedClock(point), point=point, write=lambda line: lines.append(orjson.loads(orjson.dumps(line)))
    )
    inputs.plane = Told()
    instance = Instance(1, "m", kind_of(PROFILE), "mixed", 0.0)
    requests = [
        Request(1, "m", RequestClass(name="chat", kind="interactive"), 0.0, 0),
        Request(
            2**63 - 1, "", RequestClass(name="", kind="batch", deadline_s=1e-9, weight=1e300), -5.0, 2**31, None, -6.0
        ),
    ]
    instance.requests = {request.id: request for request in requests}
    inputs.start()
    inputs.begin({}, attached=True)
    inputs.begin({"m": 0, "n": 1_000_000}, attached=False)
    inputs.restore(Learned(policy="chiron", wall_s=0.0, models={}), -1e9)
    inputs.take_over(0.0)
    inputs.adopt_instance("", "", "batch", number=2**40 + 1, max_batch_size=2**31, attach=lambda _: Told())
    for request, begun_s in zip(requests, (-1.0, -1e9), strict=True):
        inputs.adopt_running(
            instance, request, epoch=2**50, tokens_done=2**31, dispatch_s=begun_s, first_token_s=begun_s
        )
    inputs.told_all()
    inputs.announce_batch("m", -1.0, "night", 3, 2**40, 1e22)
    inputs.announce_batch("m", inf, "night", -3, -(2**40), -1e22)
    inputs.shed_lost("m")
    for request in requests:
        request.max_output_tokens, request.tenant, request.tokens_done = 2**31, "a b\n", 2**31
        inputs.submit(request)
        for told in (inputs.first_token, inputs.prefilled, inputs.finished, inputs.evicted, inputs.lost):
            told(request)
        inputs.refused(request, "what it said")
        inputs.failed(request, "")
        inputs.cancel(request)
        inputs.cut_off(request)
    inputs.avoid(instance, 0.0)
    inputs.sampled([])
    for value in (0, -1, nan, inf, 1e300, 0.5):
        inputs.sampled([Sample(**dict.fromkeys(SAMPLE_FIELDS, value))])
    for count, real in ((0, 0.0), (2**62 - 1, 1e300)):
        few = StageSample(ready=count, starting=count, draining=count, busy_s=real, passes=real, tokens=real)
        more = replace(few, waiting=real, kv_used_tokens=count, start_s=real)
        sample = PipelineSample(taken_s=0.0, stages=(few, more), running=count, waiting=count, context_tokens=real)
        inputs.stages_sampled(instance, sample)
        inputs.stages_sampled(instance, replace(sample, stages=()))
    inputs.capacity_told(instance, 0)
    inputs.instance_ready(instance, Told())
    instance.source = "memory"
    inputs.instance_ready(instance, Told())
    inputs.instance_failed(instance)
    inputs.instance_asleep(instance)
    inputs.instance_leaving(instance)
    inputs.kinds_limited({"small": 0})
    inputs.kinds_found({"small": 3})
    inputs.kinds_asleep({"small": 0})

    assert {line["k"] for line in lines} == set(ARGUMENTS)
    for line in lines:
        assert len(checked(line, 0.0)["a"]) == len(line["a"])
