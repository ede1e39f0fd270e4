"""Random JSON that fits a schema: what an emulated engine answers where JSON is required.

The same schema and the same random numbers give the same text. How much is made up is limited: once a value has become
large or deep, optional properties are left out, lists get no more items than they must, and of alternatives the
flattest is taken, which comes to an end (``schema`` has refused what does not).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor
from random import Random

from chiron.engines.serve.schemas.nodes import (
    Anything,
    Array,
    Flag,
    Literal,
    Node,
    Number,
    Object,
    Schema,
    SchemaError,
    Text,
    Union,
    flattest,
)
from chiron.engines.serve.schemas.pattern import Chain, Chars, Either, Pattern, Repeat
from chiron.engines.serve.vocabulary import WORDS

_VALUES = 100
"""Values made up that nothing requires, about."""
_DEPTH = 8
"""Levels down to which they are made up."""
_OPTIONAL = 0.75
_ITEMS_MORE = 3
_REPEATS_MORE = 6
_TRIES = 50
"""For one more item of a list whose items must differ."""
_PRINTABLE = (0x21, 0x7E)


def make_up(schema: Schema, random: Random) -> str:
    """A value as compact JSON. Raises SchemaError where items of a list cannot all differ."""
    return _Maker(schema, random).value(schema.root, 0)


@dataclass(slots=True)
class _Maker:
    schema: Schema
    random: Random
    left: int = _VALUES

    def value(self, node: Node, depth: int) -> str:
        self.left -= 1
        node = self.schema.resolve(node)
        random = self.random
        match node:
            case Literal():
                return random.choice(node.texts)
            case Flag():
                return random.choice(("true", "false"))
            case Text():
                return json.dumps(text(node, random), ensure_ascii=False)
            case Number():
                return number(node, random)
            case Anything():
                return json.dumps(_words(random, 1, 2))
            case Union():
                return self.value(self._option(node, depth), depth)
            case Array():
                return self._array(node, depth)
            case Object():
                return self._object(node, depth)
            case _:
                raise AssertionError(node)  # References have been followed.

    def _option(self, node: Union, depth: int) -> Node:
        if not self._may(depth):
            return flattest(self.schema, node)
        fitting = [option for option in node.options if self._fits(option, depth)]
        return self.random.choice(fitting) if fitting else flattest(self.schema, node)

    def _may(self, depth: int) -> bool:
        """Whether there is room for what need not be."""
        return depth < _DEPTH and self.left > 0

    def _fits(self, node: Node, depth: int) -> bool:
        return self._may(depth + self.schema.height(node))

    def _array(self, node: Array, depth: int) -> str:
        count = node.least
        rest = len(node.prefix) <= count
        if self._may(depth):
            count += self.random.randint(0, _ITEMS_MORE) if rest else len(node.prefix) - count
        if node.most is not None:
            count = min(count, node.most)
        items: list[str] = []
        for i in range(count):
            inner = node.prefix[i] if i < len(node.prefix) else node.items
            if i >= node.least and not self._fits(inner, depth + 1):
                break
            item = self._other(inner, depth + 1, items) if node.unique else self.value(inner, depth + 1)
            if item is None:
                if i >= node.least:
                    break
                raise SchemaError(f"no {node.least} different items are known for a list whose items must differ.")
            items.append(item)
        return f"[{','.join(items)}]"

    def _other(self, node: Node, depth: int, items: list[str]) -> str | None:
        for _ in range(_TRIES):
            item = self.value(node, depth)
            if item not in items:
                return item
        return None

    def _object(self, node: Object, depth: int) -> str:
        fields = {}
        for each in node.properties:
            if each.required or (self._fits(each.node, depth + 1) and self.random.random() < _OPTIONAL):
                fields[each.name] = self.value(each.node, depth + 1)
        if not node.properties and node.extra is not None and self._fits(node.extra, depth + 1):
            for name in self.random.sample(WORDS, self.random.randint(1, _ITEMS_MORE)):
                fields[name] = self.value(node.extra, depth + 1)
        return "{" + ",".join(f"{json.dumps(name, ensure_ascii=False)}:{value}" for name, value in fields.items()) + "}"


def text(node: Text, random: Random) -> str:
    """A string of the lengths, or of the pattern, that a schema asks for."""
    if node.pattern is not None:
        return _matching(node.pattern, random)
    found = _words(random, 1, 3)
    while len(found) < node.least:
        found += " " + _words(random, 1, 8)
    if node.most is not None and len(found) > node.most:
        found = found[: max(node.least, node.most)]
    return found


def number(node: Number, random: Random) -> str:
    """A number within bounds, as JSON."""
    least, most = node.least, node.most
    if node.multiple is not None:
        return _multiple(node, random)
    if node.whole:
        low = int(least) if least is not None else (0 if most is None else int(most) - 100)
        high = int(most) if most is not None else low + 100
        return str(random.randint(max(low, high - 1000) if least is None else low, high))
    low_end = least if least is not None else (0.0 if most is None else most - 100.0)
    high_end = most if most is not None else low_end + 100.0
    drawn = round(random.uniform(low_end, high_end), 2)
    if _inside(drawn, node):
        return json.dumps(drawn)
    middle = low_end + (high_end - low_end) / 2
    if _inside(middle, node):
        return json.dumps(middle)
    raise SchemaError("no number is known within the bounds.")


def _multiple(node: Number, random: Random) -> str:
    unit = Decimal(str(node.multiple))
    first = ceil(Decimal(str(node.least)) / unit) if node.least is not None else None
    last = floor(Decimal(str(node.most)) / unit) if node.most is not None else None
    if first is not None and node.open_least and first * unit == Decimal(str(node.least)):
        first += 1
    if last is not None and node.open_most and last * unit == Decimal(str(node.most)):
        last -= 1
    low = first if first is not None else (0 if last is None else last - 100)
    high = last if last is not None else low + 100
    for _ in range(_TRIES if low <= high else 0):
        found = random.randint(low, high) * unit
        # Some checkers divide floats, so that 1.9 is no multiple of 0.1 to them; others are as good.
        if (float(found) / float(unit)).is_integer() and (not node.whole or found == found.to_integral_value()):
            return format(found.normalize() if found else found, "f")
    raise SchemaError("no number is known that is within the bounds and a multiple at once.")


def _inside(value: float, node: Number) -> bool:
    over = node.least is None or value > node.least or (value == node.least and not node.open_least)
    under = node.most is None or value < node.most or (value == node.most and not node.open_most)
    return over and under


def _words(random: Random, least: int, most: int) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(least, most)))


def _matching(pattern: Pattern, random: Random) -> str:
    match pattern:
        case Chars():
            low, high = _PRINTABLE
            plain = [(max(low, a), min(high, b)) for a, b in pattern.ranges if a <= high and b >= low]
            letters = [(max(97, a), min(122, b)) for a, b in plain if a <= 122 and b >= 97]
            first, last = random.choice(letters or plain or pattern.ranges)
            return chr(random.randint(first, last))
        case Repeat():
            most = pattern.least + _REPEATS_MORE
            times = random.randint(pattern.least, most if pattern.most is None else min(most, pattern.most))
            return "".join([_matching(pattern.part, random) for _ in range(times)])
        case Chain():
            return "".join([_matching(part, random) for part in pattern.parts])
        case Either():
            return _matching(random.choice(pattern.options), random)
