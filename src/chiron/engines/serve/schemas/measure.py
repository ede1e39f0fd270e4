"""How large the least value is that fits a JSON schema: whoever makes one up can rely on coming to an end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from chiron.engines.serve.schemas.nodes import (
    DEPTH_MAX,
    Array,
    Node,
    Object,
    Ref,
    Schema,
    Text,
    Union,
    error_at,
    flattest,
    required,
)

VALUES_MAX = 10_000
"""Values within the least value that fits."""


def measure(schema: Schema, where: str) -> int:
    """Find the flattest value of each node, and how many values the root's has; raise SchemaError if there is none, or
    if it is too large."""
    users: dict[str, set[str]] = {}
    for pointer, node in schema.parts.items():
        for used in _refs(node):
            users.setdefault(used, set()).add(pointer)
    heights = schema.heights
    waiting = deque(schema.parts)
    # Each part is set once, by the flattest of what is known then, and only then are those that use it looked at again.
    while waiting:
        pointer = waiting.popleft()
        if pointer in heights:
            continue
        height = _height(schema.parts[pointer], heights, {})
        if height is not None:
            heights[pointer] = height
            waiting.extend(user for user in users.get(pointer, ()) if user not in heights)
    for node in schema.parts.values():
        _height(node, heights, schema.node_heights)
    height = _height(schema.root, heights, schema.node_heights)
    if height is None:
        raise error_at(where, "no finite value fits it, as it needs itself within itself")
    if height > DEPTH_MAX:
        raise error_at(where, f"the flattest value that fits it has {height} levels; at most {DEPTH_MAX} are allowed")
    values = _values(schema, schema.root, {})
    if values > VALUES_MAX:
        raise error_at(where, f"the least value that fits it has more than {VALUES_MAX} values in it")
    return values


def _children(node: Node) -> Iterator[Node]:
    match node:
        case Array():
            yield from node.prefix
            yield node.items
        case Object():
            yield from (property.node for property in node.properties)
            if node.extra is not None:
                yield node.extra
        case Union():
            yield from node.options


def _refs(node: Node) -> Iterator[str]:
    if isinstance(node, Ref):
        yield node.pointer
    for child in _children(node):
        yield from _refs(child)


def _height(node: Node, heights: dict[str, int], seen: dict[int, int]) -> int | None:
    """Levels of the flattest value; None: it is not known that there is one. Notes those of all nodes in ``seen``."""
    if isinstance(node, Ref):
        return heights[node.pointer] + 1 if node.pointer in heights else None
    found: int | None
    inner = [(child, _height(child, heights, seen)) for child in _children(node)]
    match node:
        case Union():
            known = [height for _, height in inner if height is not None]
            found = min(known) if known else None
        case Array() | Object():
            needed = {id(child) for child in required(node)}
            levels = [height for child, height in inner if id(child) in needed]
            found = None if any(height is None for height in levels) else 1 + max((h or 0 for h in levels), default=0)
        case _:
            found = 1
    if found is not None:
        seen[id(node)] = found
    return found


def _values(schema: Schema, node: Node, known: dict[int, int]) -> int:
    """Values within the flattest value, itself included; counted no further than somewhat above the limit."""
    node = schema.resolve(node)
    count = known.get(id(node))
    if count is not None:
        return count
    match node:
        case Union():
            count = _values(schema, flattest(schema, node), known)
        case Array():
            first = node.prefix[: node.least]
            count = 1 + sum(_values(schema, child, known) for child in first)
            if node.least > len(first):
                count += (node.least - len(first)) * _values(schema, node.items, known)
        case Object():
            count = 1 + sum(_values(schema, child, known) for child in required(node))
        case Text():
            count = 1 + node.least // 20
        case _:
            count = 1
    known[id(node)] = count = min(count, VALUES_MAX + 1)
    return count
