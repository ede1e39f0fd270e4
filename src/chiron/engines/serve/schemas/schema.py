"""JSON schemas, read strictly into values that an engine can enforce.

An engine that offers JSON of a schema must enforce all of it, so what is not understood here is an error
that names the keyword and its place. What only describes (``title``, ``default``, unknown keywords) is
ignored, as JSON Schema has it. Read are types, ``properties``, ``required``, ``additionalProperties``, ``items``,
``prefixItems``, ``enum``, ``const``, ``anyOf``, ``oneOf`` where no value can fit two, ``allOf`` of one, ``$ref``
within the schema (also to itself), and bounds of lengths, counts and numbers, ``pattern`` and ``format``.

Clients write schemas, so reading costs time in proportion to their size, sizes are limited, and a schema that no value
fits, or only one that is too large or too deep, is an error: whoever makes a value up can rely on coming to an end.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any
from urllib.parse import unquote

from chiron.engines.serve.schemas.formats import FORMATS
from chiron.engines.serve.schemas.measure import VALUES_MAX, measure
from chiron.engines.serve.schemas.nodes import (
    DEPTH_MAX,
    Anything,
    Array,
    Flag,
    Literal,
    Node,
    Number,
    Object,
    Property,
    Ref,
    Schema,
    SchemaError,
    Text,
    Union,
    cut_short,
    error_at,
)
from chiron.engines.serve.schemas.pattern import PatternError, read_pattern, within

NODES_MAX = 10_000
"""Schemas within the schemas of one request, values of ``enum`` included."""

LENGTH_MAX = 10_000
"""``minLength``, in characters."""

BOUND_MAX = 10**15
"""Of numbers, either way: whatever reads JSON keeps whole numbers exact up to there."""

_REFUSED = tuple(
    "not if then else contains minContains maxContains patternProperties propertyNames minProperties maxProperties "  # noqa: SIM905
    "dependentRequired dependentSchemas dependencies unevaluatedItems unevaluatedProperties additionalItems "
    "$dynamicRef $recursiveRef".split()
)
"""Keywords that restrict values in ways that are not kept here."""

_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")

_HINTS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""Where no type is said, keywords of one type say which."""


class Allowance:
    """How many nodes the schemas of one request may still have, together."""

    def __init__(self, nodes: int = NODES_MAX) -> None:
        self._left = nodes

    def take(self, where: str, nodes: int = 1) -> None:
        self._left -= nodes
        if self._left < 0:
            raise SchemaError(f"{where}: the schemas of a request may have {NODES_MAX} parts together; these have more")


def read_schema(given: Any, where: str, allowance: Allowance | None = None) -> Schema:
    """The schema in a JSON value that is found at ``where``. Raises SchemaError."""
    reader = _Reader(given, where, allowance or Allowance())
    root = reader.node(given, where, 0)
    parts = reader.referred()
    schema = Schema(root, parts)
    return replace(schema, least_values=measure(schema, where))


class _Reader:
    def __init__(self, root: Any, where: str, allowance: Allowance) -> None:
        self._root = root
        self._where = where
        self._allowance = allowance
        self._referred: set[str] = set()
        """JSON pointers that something refers to."""
        self._waiting: deque[str] = deque()
        """Those of them that are not read yet."""

    def referred(self) -> dict[str, Node]:
        parts: dict[str, Node] = {}
        # Reading one may find others; they queue at the end, so chains of references cost no depth.
        while self._waiting:
            pointer = self._waiting.popleft()
            parts[pointer] = self.node(self._find(pointer), f"{self._where}{pointer}", 0)
        return parts

    def node(self, given: Any, where: str, depth: int) -> Node:
        self._allowance.take(where)
        if depth > DEPTH_MAX:
            raise error_at(where, f"nested deeper than {DEPTH_MAX} levels")
        if given is True:
            return Anything()
        if not isinstance(given, dict):
            raise error_at(where, f"it is {_shown(given)}; a schema is an object or true")
        for keyword in _REFUSED:
            if keyword in given:
                raise error_at(where, f"{keyword!r} cannot be enforced by this engine; leave it out")
        for keyword, read in (("$ref", self._ref), ("allOf", self._all_of), ("anyOf", self._any), ("oneOf", self._one)):
            if keyword in given:
                return read(_alone(keyword, given, where), f"{where}.{keyword}", depth)
        if "const" in given or "enum" in given:
            return self._literal(given, where)
        types = _types(given, where)
        if given.get("nullable") is True and types:
            types = [*types, "null"]
        options = [self._typed(type, given, where, depth) for type in dict.fromkeys(types)]
        if not options:
            return Anything()
        return options[0] if len(options) == 1 else Union(tuple(options))

    def _ref(self, given: Any, where: str, depth: int) -> Node:
        if not isinstance(given, str) or not (given == "#" or given.startswith("#/")):
            raise error_at(where, f"it is {_shown(given)}; only references within the schema ('#/...') are followed")
        pointer = given[1:]
        if pointer not in self._referred:
            self._find(pointer)
            self._referred.add(pointer)
            self._waiting.append(pointer)
        return Ref(pointer)

    def _find(self, pointer: str) -> Any:
        found = self._root
        for part in pointer.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isascii() and name.isdigit() and int(name[:9]) < len(found):
                found = found[int(name[:9])]
            else:
                raise error_at(self._where, f"'#{cut_short(pointer)}' refers to nothing")
        return found

    def _all_of(self, given: Any, where: str, depth: int) -> Node:
        if not isinstance(given, list) or len(given) != 1:
            raise error_at(where, "only a list of one schema can be kept by this engine")
        return self.node(given[0], f"{where}[0]", depth + 1)

    def _any(self, given: Any, where: str, depth: int) -> Node:
        if not isinstance(given, list) or not given:
            raise error_at(where, "it must be a list of schemas that is not empty")
        return Union(tuple(self.node(option, f"{where}[{i}]", depth + 1) for i, option in enumerate(given)))

    def _one(self, given: Any, where: str, depth: int) -> Node:
        union = self._any(given, where, depth)
        assert isinstance(union, Union)
        marks = [_marks(self._follow(option)) for option in given]
        if any(not mark for mark in marks) or not _apart(marks):
            raise error_at(
                where, "a value might fit two of them, which oneOf forbids; use anyOf, or tell them apart by a const"
            )
        return union

    def _follow(self, given: Any) -> Any:
        for _ in range(DEPTH_MAX):
            if not (isinstance(given, dict) and isinstance(given.get("$ref"), str)):
                break
            given = self._find(given["$ref"][1:])
        return given

    def _literal(self, given: dict[str, Any], where: str) -> Node:
        values = [given["const"]] if "const" in given else given["enum"]
        if not isinstance(values, list) or not values:
            raise error_at(f"{where}.enum", "it must be a list of values that is not empty")
        if "const" in given and "enum" in given:
            values = [value for value in values if _among(value, given["enum"])]
        self._allowance.take(where, len(values))
        types = _types(given, where) if "type" in given else []
        if given.get("nullable") is True and types:
            types = [*types, "null"]
        fitting = [value for value in values if not types or any(_is_a(value, type) for type in types)]
        if not fitting:
            raise error_at(where, "none of the values is of the type")
        beside = sorted(name for hints in _HINTS.values() for name in hints if name in given)
        if beside:
            raise error_at(
                where, f"{beside[0]!r} beside {'const' if 'const' in given else 'enum'!r} cannot be enforced"
            )
        return Literal(tuple(_json(value, where) for value in fitting))

    def _typed(self, type: str, given: dict[str, Any], where: str, depth: int) -> Node:
        match type:
            case "object":
                return self._object(given, where, depth)
            case "array":
                return self._array(given, where, depth)
            case "string":
                return _text(given, where)
            case "boolean":
                return Flag()
            case "null":
                return Literal(("null",))
            case _:
                return _number(given, where, whole=type == "integer")

    def _object(self, given: dict[str, Any], where: str, depth: int) -> Object:
        properties, required = given.get("properties", {}), given.get("required", [])
        if not isinstance(properties, dict):
            raise error_at(f"{where}.properties", f"it is {_shown(properties)}; it must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise error_at(f"{where}.required", f"it is {_shown(required)}; it must be a list of names")
        more = given.get("additionalProperties", True)
        extra = None if more is False else self.node(more, f"{where}.additionalProperties", depth + 1)
        wanted = dict.fromkeys(required)
        found = []
        for name, value in properties.items():
            place = f"{where}.properties.{name}"
            _json(name, place)
            found.append(Property(name, self.node(value, place, depth + 1), name in wanted))
        for name in wanted:
            if name not in properties:
                if extra is None:
                    raise error_at(
                        f"{where}.required", f"{cut_short(name)!r} is required, and not among the properties"
                    )
                self._allowance.take(where)
                _json(name, where)
                found.append(Property(name, extra, True))
        return Object(tuple(found), extra)

    def _array(self, given: dict[str, Any], where: str, depth: int) -> Array:
        prefix = given.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise error_at(f"{where}.prefixItems", f"it is {_shown(prefix)}; it must be a list of schemas")
        first = tuple(self.node(item, f"{where}.prefixItems[{i}]", depth + 1) for i, item in enumerate(prefix))
        least = _count(given, "minItems", where, VALUES_MAX) or 0
        most = _count(given, "maxItems", where)
        items = given.get("items", True)
        if items is False:
            most = len(first) if most is None else min(most, len(first))
            items = True
        _ordered(least, most, "Items", where)
        unique = given.get("uniqueItems", False)
        if not isinstance(unique, bool):
            raise error_at(f"{where}.uniqueItems", f"it is {_shown(unique)}; it must be true or false")
        return Array(self.node(items, f"{where}.items", depth + 1), least, most, first, unique)


_KNOWN = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}).union(*_HINTS.values())


def _alone(keyword: str, given: dict[str, Any], where: str) -> Any:
    """What a keyword holds that leaves no room for others beside it. A type goes on to options that say none."""
    beside = sorted((given.keys() & _KNOWN) - {keyword})
    value = given[keyword]
    if beside == ["type"] and keyword != "$ref" and isinstance(value, list):
        said = given["type"]
        if all(isinstance(o, dict) and "$ref" not in o and o.get("type", said) == said for o in value):
            return [{"type": said, **option} for option in value]
    if beside:
        raise error_at(where, f"{beside[0]!r} beside {keyword!r} cannot be enforced by this engine")
    return value


def _types(given: dict[str, Any], where: str) -> list[str]:
    said = given.get("type")
    if said is None:
        return [type for type, hints in _HINTS.items() if any(hint in given for hint in hints)][:1]
    types = [said] if isinstance(said, str) else said
    if not isinstance(types, list) or not types or not all(isinstance(t, str) and t in _TYPES for t in types):
        raise error_at(f"{where}.type", f"it is {_shown(said)}; it must be of {', '.join(_TYPES)}")
    return types


def _text(given: dict[str, Any], where: str) -> Text:
    least = _count(given, "minLength", where, LENGTH_MAX) or 0
    most = _count(given, "maxLength", where)
    _ordered(least, most, "Length", where)
    written, format = given.get("pattern"), given.get("format")
    known = FORMATS.get(format) if isinstance(format, str) else None
    if written is not None and known is not None:
        raise error_at(where, f"'pattern' beside the format {format!r} cannot be enforced by this engine")
    if written is None and known is None:
        return Text(least, most)
    if not isinstance(written, str | None):
        raise error_at(f"{where}.pattern", f"it is {_shown(written)}; it must be a string")
    try:
        pattern = read_pattern(known or written or "")
    except PatternError as error:
        raise error_at(f"{where}.pattern", f"{_shown(written)}: {error}") from None
    kept = within(pattern, least, most)
    if kept is None:
        what = "format" if written is None else "pattern"
        raise error_at(where, f"no text is known that keeps {what!r} and {least} to {most} characters at once")
    return Text(least, most, kept)


def _number(given: dict[str, Any], where: str, *, whole: bool) -> Number:
    least, most = _bound(given, "minimum", where), _bound(given, "maximum", where)
    over, under = _open_bound(given, "exclusiveMinimum", where), _open_bound(given, "exclusiveMaximum", where)
    # Draft 4 writes true beside the bound.
    open_least, open_most = over is True and least is not None, under is True and most is not None
    if not isinstance(over, bool | None) and (least is None or over >= least):
        least, open_least = over, True
    if not isinstance(under, bool | None) and (most is None or under <= most):
        most, open_most = under, True
    multiple = _bound(given, "multipleOf", where)
    if multiple is not None and multiple <= 0:
        raise error_at(f"{where}.multipleOf", f"it is {_shown(multiple)}; it must be above 0")
    if whole:
        least, open_least = (None, False) if least is None else (_whole_from(least, open_least), False)
        most, open_most = (None, False) if most is None else (-_whole_from(-most, open_most), False)
    number = Number(whole, least, most, open_least, open_most, multiple)
    if least is not None and most is not None and (least > most or (least == most and (open_least or open_most))):
        raise error_at(where, "no number is within its bounds")
    return number


def _whole_from(least: float, is_open: bool) -> int:
    """The least whole number at or above (above, if open)."""
    floor = int(least // 1)
    return floor if floor == least and not is_open else floor + 1


def _bound(given: dict[str, Any], name: str, where: str) -> float | int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error_at(f"{where}.{name}", f"it is {_shown(value)}; it must be a number")
    if not abs(value) <= BOUND_MAX or not isfinite(value):
        raise error_at(f"{where}.{name}", f"it must be from -{BOUND_MAX:.0e} to {BOUND_MAX:.0e}")
    return int(value) if value == int(value) else value


def _open_bound(given: dict[str, Any], name: str, where: str) -> float | int | bool | None:
    return bool(given[name]) if isinstance(given.get(name), bool) else _bound(given, name, where)


def _count(given: dict[str, Any], name: str, where: str, most: int | None = None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (most is not None and value > most):
        bounds = "at least 0" if most is None else f"from 0 to {most}"
        raise error_at(f"{where}.{name}", f"it is {_shown(value)}; it must be a whole number {bounds}")
    return value


def _ordered(least: int, most: int | None, what: str, where: str) -> None:
    if most is not None and least > most:
        raise error_at(where, f"'min{what}' {least} is above 'max{what}' {most}")


def _marks(given: Any) -> dict[str, frozenset[str]]:
    """What tells values of a schema from those of another: the types, or the values of a property that they must
    have."""
    if not isinstance(given, dict):
        return {}
    if "const" in given or "enum" in given:
        values = given.get("enum", [given.get("const")])
        return (
            {"": frozenset(json.dumps(value, sort_keys=True) for value in values)} if isinstance(values, list) else {}
        )
    types = given.get("type")
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or not all(isinstance(type, str) for type in types):
        return {}
    marks = {"type": frozenset("number" if type == "integer" else type for type in types)}
    properties, required = given.get("properties"), given.get("required")
    if types == ["object"] and isinstance(properties, dict) and isinstance(required, list):
        for name in required:
            values = properties.get(name) if isinstance(name, str) else None
            if isinstance(values, dict) and ("const" in values or isinstance(values.get("enum"), list)):
                marks[f".{name}"] = _marks(values).get("", frozenset())
    return marks


def _apart(marks: Sequence[dict[str, frozenset[str]]]) -> bool:
    """Whether each two are told apart by something."""
    if len(marks) > DEPTH_MAX:
        return False
    pairs = ((one, other) for i, one in enumerate(marks) for other in marks[:i])
    return all(any(one[name].isdisjoint(other[name]) for name in one.keys() & other.keys()) for one, other in pairs)


def _among(value: Any, values: Any) -> bool:
    return isinstance(values, list) and any(type(value) is type(other) and value == other for other in values)


def _is_a(value: Any, type: str) -> bool:
    if type == "integer":
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if type == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type_of_none}
    return isinstance(value, kinds[type])


type_of_none = type(None)


def _json(value: Any, where: str) -> str:
    """Compact JSON. Raises SchemaError for what UTF-8 cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except ValueError:
        raise error_at(where, "it holds half a surrogate pair, or a number that JSON has not") from None
    return text


def _shown(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > 10:
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)} fields"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


ANY_OBJECT = read_schema({"type": "object"}, "")
