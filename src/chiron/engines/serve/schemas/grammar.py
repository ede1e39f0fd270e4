"""Grammars that let a model say only JSON of a schema, in the EBNF that XGrammar reads.

What a grammar lets through fits the schema; not everything that fits is let through: whitespace is a space here and
there, properties come in the schema's order, and numbers have no exponents. What a grammar cannot hold (multiples,
items that must differ) is an error. ``Bounds`` close what a schema leaves open, for models that would never come to an
end.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from chiron.engines.serve.schemas.nodes import (
    Anything,
    Array,
    Flag,
    Literal,
    Node,
    Number,
    Object,
    Ref,
    Schema,
    SchemaError,
    Text,
    Union,
)
from chiron.engines.serve.schemas.pattern import Chain, Chars, Either, Pattern, Repeat, length

SIZE_MAX = 64_000
"""Characters of a grammar. Compiling one takes some microseconds for each, and nothing else runs meanwhile."""
REPEATS_MAX = 20_000
"""Characters that a pattern could be written out to."""
OPTIONAL_MAX = 300
"""Optional properties of one object: the time that they take to compile grows faster than their number."""
_STEP = 16
"""What repeats more than twice as often is written as groups of so many: XGrammar counts slowly."""
_DIGITS = 15
"""Of whole numbers, which are exact in every reader up to there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Ends of what a schema leaves open; None: no end."""

    text_chars: int | None = None
    items: int | None = None


def json_grammar(schema: Schema, bounds: Bounds) -> str:
    """Raises SchemaError for what cannot be enforced."""
    writer = _Writer(bounds)
    return writer.grammar(writer.rule(schema, schema.root))


def call_grammar(tools: Sequence[tuple[str, Schema]], bounds: Bounds) -> str:
    """``{"name":"NAME","arguments":ARGUMENTS}`` of one of the tools, by name and schema of its arguments; without any
    space outside the arguments, so that it can be read as it comes."""
    writer = _Writer(bounds)
    calls = [f'{_quoted(call_opening(name))} {writer.rule(schema, schema.root)} "}}"' for name, schema in tools]
    return writer.grammar(" | ".join(calls))


def call_opening(name: str) -> str:
    return f'{{"name":{json.dumps(name)},"arguments":'


_COMMON = r"""
any ::= object | array | text | number | "true" | "false" | "null"
object ::= "{" (member ("," sp member)*)? "}"
array ::= "[" (any ("," sp any)*)? "]"
member ::= text ":" sp any
sp ::= " "?
char ::= [^"\\\u0000-\u001f\u007f] | "\\" ["\\/bfnrt]
number ::= "-"? whole fraction?
whole ::= "0" | [1-9] [0-9]{0,14}
fraction ::= "." [0-9]{1,15}
"""


class _Writer:
    """Collects rules, each written once."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._rules: list[str] = []
        self._size = 0
        self._named: dict[tuple[int, str], str] = {}
        """Rules of referred parts, by schema and pointer."""
        self._bodies: dict[str, str] = {}
        """Rules by what they say."""
        self._groups: dict[str, str] = {}
        """Rules that are one rule ``_STEP`` times, by that."""

    def grammar(self, root: str) -> str:
        text = f'text ::= "\\"" {self._chars(0, None)} "\\""'
        return "\n".join([f"root ::= {root}", *self._rules, text]) + _COMMON

    def rule(self, schema: Schema, node: Node) -> str:
        """What stands for a node in another rule: a name, or something short."""
        match node:
            case Ref():
                return self._part(schema, node.pointer)
            case Anything():
                return "any"
            case Flag():
                return '("true" | "false")'
            case Literal():
                return self._add(" | ".join(_quoted(text) for text in node.texts))
            case Text():
                return self._text(node)
            case Number():
                return self._number(node)
            case Union():
                return self._add(" | ".join(self.rule(schema, option) for option in node.options))
            case Array():
                return self._array(schema, node)
            case Object():
                return self._object(schema, node)

    def _part(self, schema: Schema, pointer: str) -> str:
        key = (id(schema), pointer)
        name = self._named.get(key)
        if name is None:
            name = self._named[key] = f"p{len(self._named)}"
            body = self.rule(schema, schema.parts[pointer])
            # A part that only refers to itself fits nothing by that.
            if body != name:
                self._rules.append(f"{name} ::= {body}")
            else:
                raise SchemaError(f"#{pointer[:200]} refers only to itself.")
        return name

    def _add(self, body: str) -> str:
        if body in self._bodies:
            return self._bodies[body]
        self._size += len(body)
        if self._size > SIZE_MAX:
            raise SchemaError(f"the schemas take more than {SIZE_MAX} characters of grammar, which is too much here.")
        name = self._bodies[body] = f"r{len(self._rules)}"
        self._rules.append(f"{name} ::= {body}")
        return name

    # -- strings and numbers -------------------------------------------------------------------------------------

    def _chars(self, least: int, most: int | None) -> str:
        end = self._bounds.text_chars
        if most is None and end is not None:
            most = max(least, end)
        return self._repeat("char", least, most)

    def _repeat(self, unit: str, least: int, most: int | None) -> str:
        """``least`` to ``most`` times a rule, or somewhat fewer than ``most`` where that are many."""
        exactly = self._exactly(unit, least)
        if most is None:
            return f"{exactly} {unit}*"
        return f"{exactly} {self._up_to(unit, most - least)}"

    def _exactly(self, unit: str, times: int) -> str:
        if times <= 2 * _STEP:
            return f"{unit}{{{times}}}" if times else '""'
        return f"{self._exactly(self._group(unit), times // _STEP)} {self._exactly(unit, times % _STEP)}"

    def _up_to(self, unit: str, times: int) -> str:
        if times <= 2 * _STEP:
            return f"{unit}{{0,{times}}}" if times else '""'
        return f"{self._up_to(self._group(unit), (times - _STEP + 1) // _STEP)} {unit}{{0,{_STEP - 1}}}"

    def _group(self, unit: str) -> str:
        name = self._groups.get(unit)
        if name is None:
            name = self._groups[unit] = self._add(f"{unit}{{{_STEP}}}")
        return name

    def _text(self, node: Text) -> str:
        if node.pattern is None:
            if (node.least, node.most) == (0, None):
                return "text"
            return self._add(f'"\\"" {self._chars(node.least, node.most)} "\\""')
        pattern = node.pattern
        if (length(pattern, 1)[1] or 0) > REPEATS_MAX:
            raise SchemaError(
                "a pattern that can be written out to so many characters cannot be enforced by this engine."
            )
        return self._add(f'"\\"" {self._matching(pattern)} "\\""')

    def _matching(self, pattern: Pattern) -> str:
        match pattern:
            case Chars():
                return self._class(pattern)
            case Repeat():
                most = pattern.most
                if most is None and self._bounds.text_chars is not None:
                    most = max(pattern.least, self._bounds.text_chars)
                return self._repeat(self._add(self._matching(pattern.part)), pattern.least, most)
            case Chain():
                return " ".join(self._matching(part) for part in pattern.parts) or '""'
            case Either():
                return f"({' | '.join(self._matching(option) for option in pattern.options)})"

    def _class(self, chars: Chars) -> str:
        """Characters as JSON writes them within a string."""
        ranges, escaped = [], []
        for low, high in chars.ranges:
            for code, written in _ESCAPED.items():
                if low <= code <= high:
                    escaped.append(_quoted(written))
            start = max(low, 0x20)
            for code in (0x22, 0x5C, 0x7F):
                if start <= code <= high:
                    if start < code:
                        ranges.append((start, code - 1))
                    start = code + 1
            if start <= high:
                ranges.append((start, high))
        options = escaped
        if ranges:
            options = [f"[{''.join(_span(low, high) for low, high in ranges)}]", *escaped]
        if not options:
            raise SchemaError("a pattern of control characters cannot be enforced by this engine.")
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def _number(self, node: Number) -> str:
        if node.multiple is not None and not (node.whole and node.multiple == 1):
            raise SchemaError("'multipleOf' cannot be enforced by this engine.")
        if node.least is None and node.most is None:
            return '("-"? whole)' if node.whole else "number"
        options = _between(node)
        if not options:
            raise SchemaError("numbers between such bounds cannot be enforced by this engine.")
        return self._add(" | ".join(options))

    # -- lists and objects ---------------------------------------------------------------------------------------

    def _array(self, schema: Schema, node: Array) -> str:
        if node.unique:
            raise SchemaError("'uniqueItems' cannot be enforced by this engine.")
        most, end = node.most, self._bounds.items
        if end is not None and (most is None or most > end):
            most = max(node.least, len(node.prefix), end)
        if most == 0:
            return '"[]"'
        first = [self.rule(schema, item) for item in node.prefix[:most]]
        item = self.rule(schema, node.items)
        rest = self._more(item, max(0, node.least - len(first)), None if most is None else most - len(first))
        if not first:
            least = max(0, node.least - 1)
            body = f"{item} {self._more(item, least, None if most is None else most - 1)}"
            return self._add(f'"[" ({body}){"" if node.least else "?"} "]"')
        # From the last to the first: each may be the end, once there are enough.
        tail = rest
        for i in range(len(first) - 1, -1, -1):
            here = f"{first[i]} {tail}" if i == 0 else f'"," sp {first[i]} {tail}'
            tail = self._add(here) + ("" if i < node.least else "?")
        return self._add(f'"[" {tail} "]"')

    def _more(self, item: str, least: int, most: int | None) -> str:
        return '""' if most == 0 else self._repeat(self._add(f'"," sp {item}'), least, most)

    def _object(self, schema: Schema, node: Object) -> str:
        if not node.properties:
            if node.extra is None:
                return '"{}"'
            if isinstance(node.extra, Anything) and self._bounds.items is None:
                return "object"
            member = self._add(f'text ":" sp {self.rule(schema, node.extra)}')
            more = self._more(member, 0, None if self._bounds.items is None else max(0, self._bounds.items - 1))
            return self._add(f'"{{" ({member} {more})? "}}"')
        members = [
            (f"{_quoted(json.dumps(p.name, ensure_ascii=False) + ':')} sp {self.rule(schema, p.node)}", p.required)
            for p in node.properties
        ]
        if sum(not required for _, required in members) > OPTIONAL_MAX:
            raise SchemaError(
                f"more than {OPTIONAL_MAX} optional properties of an object are too many for this engine."
            )
        # Whether one has been written before decides whether a comma stands before the next: after the first that is
        # required one has.
        start = next((i for i, (_, required) in enumerate(members) if required), len(members))
        rest: deque[str] = deque()
        for member, required in reversed(members[start + 1 :]):
            if required:
                rest.extendleft((member, '"," sp'))
            else:
                tail = self._add(" ".join(rest) or '""')
                rest = deque([self._add(f'"," sp {member} {tail} | {tail}')])
        after = first = self._add(" ".join(rest) or '""')
        for member, required in reversed(members[: start + 1]):
            name = self._add(member)
            new_first, new_after = f"{name} {after}", f'"," sp {name} {after}'
            if not required:
                new_first, new_after = f"{new_first} | {first}", f"{new_after} | {after}"
            after, first = self._add(new_after), self._add(new_first)
        return self._add(f'"{{" {first} "}}"')


_ESCAPED = {0x22: '\\"', 0x5C: "\\\\", 0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r", 0x08: "\\b", 0x0C: "\\f"}
"""Characters that JSON escapes, as it writes them."""


def _quoted(text: str) -> str:
    """A text, as the grammar writes it. What is neither ASCII nor printable goes into classes: XGrammar writes some of
    it as ``\\xe9`` inside, and takes digits after that for more of the same."""
    parts = []
    for part in _PARTS.findall(text):
        escaped = "".join(_escape(ord(char), '"') for char in part)
        parts.append(f'"{escaped}"' if ord(part[0]) in _PLAIN else f"[{part}]")
    return " ".join(parts) or '""'


_PLAIN = range(0x20, 0x7F)
_PARTS = re.compile("[ -~]+|[^ -~]")


def _span(low: int, high: int) -> str:
    return _escape(low, "]-^") if low == high else f"{_escape(low, ']-^')}-{_escape(high, ']-^')}"


def _escape(code: int, special: str) -> str:
    """A character as it is: XGrammar reads as many digits after ``\\u`` as there are."""
    char = chr(code)
    return "\\" + char if char == "\\" or char in special else char


# -- ranges of numbers -------------------------------------------------------------------------------------------


def _between(node: Number) -> list[str]:
    """Alternatives that are the numbers within bounds; some near bounds that are no whole numbers may be missing."""
    least, most = node.least, node.most
    edge = 10**_DIGITS - 1
    low = -edge if least is None else ceil(least)
    high = edge if most is None else floor(most)
    closed_low = not (node.open_least and low == least)
    closed_high = not (node.open_most and high == most)
    found: list[str] = []
    if node.whole:
        return _whole_numbers(low, high)
    # Between two whole numbers every fraction is fine; the ends themselves may not be.
    if low <= high:
        if closed_low or low < high:
            first, last = (low if closed_low else low + 1), (high if closed_high else high - 1)
            found += _whole_numbers(first, last) if first <= last else []
        up_from, up_to = max(low, 0), high - 1
        if up_from <= up_to:
            found += [f"({'|'.join(_whole_numbers(up_from, up_to))}) {_FRACTION}"]
        down_from, down_to = max(-high, 0), -low - 1
        if down_from <= down_to:
            found += [f'"-" ({"|".join(_whole_numbers(down_from, down_to))}) {_FRACTION}']
    return found


_FRACTION = '"." [0-9]{0,14} [1-9]'
"""Not zero, which might be an end that is not allowed."""


def _whole_numbers(low: int, high: int) -> list[str]:
    found = []
    if low < 0:
        below = _natural(max(1, -high), -low)
        found += [f'"-" ({" | ".join(below)})'] if below else []
    if high >= 0:
        found += _natural(max(0, low), high)
    return found


def _natural(low: int, high: int) -> list[str]:
    """Alternatives that are the numbers from ``low`` to ``high``, without zeros before them."""
    found = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        last = min(high, 10**digits - 1)
        if first <= last:
            found.append(_same_length(str(first), str(last)))
    return found


def _same_length(low: str, high: str) -> str:
    """One expression for the numbers of equal length from ``low`` to ``high``."""
    if low == high:
        return f'"{low}"'
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}" if len(low) > 1 else "[0-9]"
    if len(low) == 1:
        return f"[{low}-{high}]"
    if low[0] == high[0]:
        return f'"{low[0]}" {_in_parentheses(_same_length(low[1:], high[1:]))}'
    rest = len(low) - 1
    first, last, options = int(low[0]), int(high[0]), []
    if low[1:] != "0" * rest:
        options.append(f'"{low[0]}" {_in_parentheses(_same_length(low[1:], "9" * rest))}')
        first += 1
    upper = None
    if high[1:] != "9" * rest:
        upper = f'"{high[0]}" {_in_parentheses(_same_length("0" * rest, high[1:]))}'
        last -= 1
    if first <= last:
        options.append(f"[{first}-{last}] [0-9]{{{rest}}}")
    if upper:
        options.append(upper)
    return _in_parentheses(" | ".join(options))


def _in_parentheses(body: str) -> str:
    return f"({body})"
