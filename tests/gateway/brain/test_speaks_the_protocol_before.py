"""Versions of the relays' protocol side by side: the released one before is read and written as it was."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, get_args

import msgspec
import pytest
from msgspec import inspect

import protocol_2
from chiron.gateway.port import messages
from chiron.gateway.port.wire import Seldom, Wire
from chiron.gateway.relay.uplink.joining import StaySettings
from outliving_site import OutlivingSite, parts, whole_stream
from virtual_loop import run_virtual

NAMES = sorted(kind.__name__ for kind in (*get_args(protocol_2.Up), *get_args(protocol_2.Down)))


def sample(told: inspect.Type) -> Any:
    """Some value of this type."""
    if isinstance(told, inspect.StructType):
        return told.cls(*(sample(field.type) for field in told.fields))
    if isinstance(told, inspect.UnionType):
        return sample(next(each for each in told.types if not isinstance(each, inspect.NoneType)))
    if isinstance(told, inspect.VarTupleType):
        return (sample(told.item_type), sample(told.item_type))
    if isinstance(told, inspect.TupleType):
        return tuple(map(sample, told.item_types))
    if isinstance(told, inspect.IntType):
        return max(told.ge or 0, 400)
    plain = {inspect.FloatType: 0.5, inspect.StrType: "text", inspect.BoolType: True, inspect.BytesType: b"bytes"}
    return plain[type(told)]  # type: ignore[index]


def crossed(name: str, source: ModuleType, target: ModuleType) -> tuple[Any, Any]:
    """A message of one version, and what the other one reads."""
    made = sample(inspect.type_info(getattr(source, name)))
    union = target.Up if getattr(target, name) in get_args(target.Up) else target.Down
    (read,) = msgspec.msgpack.decode(msgspec.msgpack.encode([made]), type=list[union])
    return made, read


def alike(before: Any, now: Any) -> bool:
    """As far as the version before has it: what is new is at the end."""
    if not isinstance(before, list | tuple):
        return bool(before == now)
    return len(before) <= len(now) and all(alike(old, new) for old, new in zip(before, now, strict=False))


def test_what_is_new_in_a_message_has_a_default() -> None:
    made = sample(inspect.type_info(protocol_2.Arrive))
    (read,) = msgspec.msgpack.decode(msgspec.msgpack.encode([made]), type=list[messages.Up])
    assert read.program == ""


@pytest.mark.parametrize("name", NAMES)
def test_each_message_of_version_2_is_the_same_in_this_version(name: str) -> None:
    for source, target in ((protocol_2, messages), (messages, protocol_2)):
        made, read = crossed(name, source, target)
        assert type(read).__name__ == name
        before, now = (made, read) if source is protocol_2 else (read, made)
        assert alike(msgspec.to_builtins(before), msgspec.to_builtins(now))


def test_hellos_are_understood_both_ways() -> None:
    old = protocol_2.Hello(version_min=2, term=7, nonce="n", returns=True)
    (read,) = msgspec.msgpack.decode(msgspec.msgpack.encode([old]), type=list[messages.Hello])
    assert (read.version, read.version_min, read.term, read.nonce, read.returns) == (2, 2, 7, "n", True)
    new = messages.Hello(version_min=2, term=7, gateway="gw-1")
    (seen,) = msgspec.msgpack.decode(msgspec.msgpack.encode([new]), type=list[protocol_2.Hello])
    assert (seen.version, seen.version_min, seen.term) == (messages.VERSION, 2, 7)


def test_relays_of_both_versions_share_one_brain_and_outlive_it() -> None:
    async def main() -> None:
        site = OutlivingSite(relays=2, stays=[StaySettings(protocol=2), StaySettings()])
        brain = await site.lead()
        await asyncio.sleep(1.0)
        assert sorted(link.wire.version for link in brain.relays.links) == [2, messages.VERSION]
        for number in (1, 2):
            site.ask(number, 40, relay=number - 1)
        await asyncio.sleep(0.5)
        site.kill()
        await asyncio.sleep(0.2)
        brain = await site.lead()
        await asyncio.sleep(1.0)
        assert sum(i.sequences for i in brain.gateway.plane.instances.values()) == 2
        await asyncio.sleep(10.0)
        assert [parts(site.clients[number]) for number in (1, 2)] == [(200, whole_stream(n, 40)) for n in (1, 2)]
        await site.close()

    run_virtual(main())


def test_versions_that_are_too_far_apart_say_so_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    tries, seldom = [0], Seldom()

    def ignore(messages: Sequence[Any]) -> None:
        raise AssertionError(messages)

    def brain() -> Wire:
        tries[0] += 1
        return Wire(
            name="a relay",
            kind=messages.Up,
            opened=lambda: None,
            received=ignore,
            closed=lambda why: None,
            hello=messages.Hello(version=9, version_min=8),
            seldom=seldom,
        )

    async def main() -> None:
        site = OutlivingSite()
        site.door.listen("brain", brain)
        await asyncio.sleep(90.0)
        said = [record.getMessage() for record in caplog.records]
        assert tries[0] > 100
        versions = f"versions 2 to {messages.VERSION}"
        theirs = "it speaks chiron-relay versions 8 to 9"
        ours = f"the connection to the brain is closed: {theirs}; this is chiron-relay {versions}"
        assert said.count(ours) == 2
        assert len(said) <= 4, said
        await site.close()

    run_virtual(main())
