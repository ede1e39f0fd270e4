"""What a JSON schema can say, as values that an engine can enforce."""

from __future__ import annotations

from dataclasses import dataclass, field

from chiron.engines.serve.schemas.pattern import Pattern

DEPTH_MAX = 64
"""Levels of a schema, and of the least value that fits one."""

_ENDLESS = 1 << 30
"""Height of what only fits inside itself."""

_WHERE_CHARS_MAX = 200


class SchemaError(Exception):
    """A schema that is not understood, or that no value fits. The message names the place."""


@dataclass(frozen=True, slots=True)
class Anything:
    """Any JSON value."""


@dataclass(frozen=True, slots=True)
class Literal:
    """One of some values, as compact JSON."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flag:
    """true or false."""


@dataclass(frozen=True, slots=True)
class Text:
    """A string; lengths in characters."""

    least: int = 0
    most: int | None = None
    pattern: Pattern | None = None
    """Every text that matches it keeps the lengths too."""


@dataclass(frozen=True, slots=True)
class Number:
    whole: bool
    least: float | int | None = None
    most: float | int | None = None
    open_least: bool = False
    """``least`` itself is not allowed."""
    open_most: bool = False
    multiple: float | int | None = None


@dataclass(frozen=True, slots=True)
class Array:
    items: Node
    least: int = 0
    most: int | None = None
    prefix: tuple[Node, ...] = ()
    unique: bool = False


@dataclass(frozen=True, slots=True)
class Property:
    name: str
    node: Node
    required: bool


@dataclass(frozen=True, slots=True)
class Object:
    properties: tuple[Property, ...] = ()
    extra: Node | None = None
    """What other properties hold; None: there are none."""


@dataclass(frozen=True, slots=True)
class Union:
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """Another part of the schema, by its JSON pointer."""

    pointer: str


Node = Anything | Literal | Flag | Text | Number | Array | Object | Union | Ref


@dataclass(frozen=True, slots=True)
class Schema:
    root: Node
    parts: dict[str, Node] = field(default_factory=dict)
    """What ``Ref`` refers to."""
    heights: dict[str, int] = field(default_factory=dict)
    """Levels of the flattest value that is known of each part."""
    node_heights: dict[int, int] = field(default_factory=dict)
    """The same of each node, by ``id``."""
    least_values: int = 1
    """Values within the flattest value."""

    def height(self, node: Node) -> int:
        """Whoever goes on to what is flattest comes to an end: a reference counts as a level."""
        if isinstance(node, Ref):
            return self.heights.get(node.pointer, _ENDLESS) + 1
        return self.node_heights.get(id(node), _ENDLESS)

    def resolve(self, node: Node) -> Node:
        """What stands behind references."""
        while isinstance(node, Ref):
            node = self.parts[node.pointer]
        return node


def error_at(where: str, what: str) -> SchemaError:
    return SchemaError(f"{cut_short(where)}: {what}.")


def cut_short(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _WHERE_CHARS_MAX else text[: _WHERE_CHARS_MAX - 3] + "..."


def required(node: Array | Object) -> list[Node]:
    """What a value must hold at least."""
    if isinstance(node, Object):
        return [property.node for property in node.properties if property.required]
    first = list(node.prefix[: node.least])
    return first + [node.items] * (node.least - len(first))


def flattest(schema: Schema, union: Union) -> Node:
    return min(union.options, key=schema.height)
