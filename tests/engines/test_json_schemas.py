"""JSON schemas of clients: what is made up or let through fits them, and what cannot be enforced is refused."""

from __future__ import annotations

import json
import re
import time
import warnings
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from chiron.engines.serve.schemas.formats import FORMATS
from chiron.engines.serve.schemas.grammar import Bounds, call_grammar, json_grammar
from chiron.engines.serve.schemas.made_up import make_up
from chiron.engines.serve.schemas.nodes import SchemaError
from chiron.engines.serve.schemas.pattern import PatternError, read_pattern
from chiron.engines.serve.schemas.schema import read_schema
from effort import examples

NAMES = [f"p{i}" for i in range(1000)]
FITTING: list[Any] = [
    {"type": "object"},
    {"type": ["string", "null"], "minLength": 30},
    {"type": "string", "maxLength": 3},
    {"type": "string", "pattern": r"^[a-z]+-\d{2,4}(x|y)?$", "maxLength": 9},
    {"type": "string", "pattern": "[0-9a-f]*", "minLength": 12},
    {"type": "string", "pattern": "^a$|^[^a-z\"\\\\]{2}$"},
    {"type": "integer", "minimum": -5, "exclusiveMaximum": 3},
    {"type": "integer", "exclusiveMinimum": 998, "maximum": 1001},
    {"type": "integer", "multipleOf": 7, "minimum": 1},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "number", "minimum": 0.25, "maximum": 0.26},
    {"type": "number", "multipleOf": 0.1, "minimum": 0.05, "maximum": 2},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "uniqueItems": True, "minItems": 4},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False, "minItems": 1},
    {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "required": ["é\"", "z"], "properties": {"é\"": {"const": {"a": [1, None]}}}},
    {"type": "string", "enum": ["a", 1, "ü"]},
    {"type": "object", "properties": {"\x7f0": {"enum": ["\u2028", "\x00", "\x850"]}}, "required": ["\x7f0"]},
    {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/a~1b"}], "$defs": {"a/b": {"type": "null"}}},
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, "tag": {"const": 1}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
    },
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}, "x": {"type": "number"}}, "required": ["kind"]},
        ]
    },
    {"type": "object", "properties": {name: {"type": "string"} for name in NAMES}, "required": NAMES[::2]},
]  # fmt: skip


@pytest.mark.parametrize("schema", FITTING, ids=lambda schema: json.dumps(schema)[:60])
def test_what_is_made_up_fits_the_schema_and_is_the_same_again(schema: Any) -> None:
    read = read_schema(schema, "schema")
    check = Draft202012Validator(schema)
    texts = [make_up(read, Random(seed)) for seed in range(10)]
    for text in texts:
        check.validate(json.loads(text))
    assert texts == [make_up(read, Random(seed)) for seed in range(10)]
    assert max(map(len, texts)) < 100_000


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_formats_are_kept(format: str) -> None:
    schema = read_schema({"type": "string", "format": format}, "schema")
    for seed in range(20):
        assert re.fullmatch(FORMATS[format], json.loads(make_up(schema, Random(seed))))
    assert json.loads(make_up(read_schema({"type": "string", "format": "int64"}, "s"), Random(1)))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "#"}, "no finite value"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no finite value"),
        ({"$ref": "#/$defs/x"}, "refers to nothing"),
        ({"$ref": "https://example.com/schema"}, "only references within"),
        ({"$ref": 1}, "only references within"),
        ({"$ref": "#/$defs/a", "minLength": 1, "$defs": {"a": {"type": "string"}}}, "'minLength' beside '$ref'"),
        ({"type": "strnig"}, "schema.type: it is \"strnig\"; it must be of object"),
        ({"type": []}, "schema.type"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "schema.properties.a.pattern"),
        ({"type": "string", "pattern": r"\bword\b"}, "not understood"),
        ({"type": "string", "pattern": "(a)\\1"}, "not understood"),
        ({"type": "string", "pattern": "(a"}, "not closed"),
        ({"type": "string", "pattern": "a{2000}"}, "a repeat of more than 1000"),
        ({"type": "string", "pattern": "(a{1000}){1000}"}, "at most 10000"),
        ({"type": "string", "pattern": "^abc$", "maxLength": 2}, "no text is known"),
        ({"type": "string", "pattern": 1}, "it must be a string"),
        ({"type": "string", "format": "uuid", "maxLength": 5}, "no text is known"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "above"),
        ({"type": "string", "minLength": 1_000_000}, "from 0 to 10000"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no number"),
        ({"type": "integer", "minimum": 0.1, "maximum": 0.9}, "no number"),
        ({"type": "number", "minimum": 1e300}, "minimum"),
        ({"type": "number", "multipleOf": 0}, "above 0"),
        ({"type": "array", "minItems": 1_000_000}, "from 0 to 10000"),
        ({"type": "array", "items": {"type": "array", "minItems": 9999, "items": True}, "minItems": 9999}, "values"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is required"),
        ({"type": "object", "properties": []}, "schema.properties"),
        ({"type": "object", "properties": {"\ud800": True}}, "surrogate"),
        ({"not": {"type": "null"}}, "'not' cannot be enforced"),
        ({"type": "object", "patternProperties": {}}, "'patternProperties' cannot be enforced"),
        ({"if": {}, "then": {}}, "'if' cannot be enforced"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "only a list of one"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "might fit two"),
        ({"anyOf": []}, "not empty"),
        ({"enum": []}, "not empty"),
        ({"enum": [1], "type": "string"}, "none of the values"),
        ({"enum": [float("inf")]}, "a number that JSON has not"),
        ({"enum": list(range(20_000))}, "10000 parts"),
        ({"properties": {"a": 1}}, "schema.properties.a: it is 1"),
        (False, "a schema is an object or true"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_and_named(schema: Any, says: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(says)):
        read_schema(schema, "schema")


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain(length: int, **last: Any) -> dict[str, Any]:
    parts = {f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(length)} | {f"r{length}": last}
    return {"$ref": "#/$defs/r0", "$defs": parts}


def doubling(levels: int) -> dict[str, Any]:
    parts = {f"r{i}": {"type": "array", "minItems": 2, "items": {"$ref": f"#/$defs/r{i + 1}"}} for i in range(levels)}
    return {"$ref": "#/$defs/r0", "$defs": parts | {f"r{levels}": {"type": "null"}}}


@pytest.mark.parametrize(
    "schema",
    [nested(80), chain(5000, type="null"), chain(5000, **{"$ref": "#/$defs/r0"}), doubling(30), nested(40)],
    ids=["deep", "long chain", "long circle", "doubling", "deep enough"],
)
def test_hostile_schemas_cost_little(schema: Any) -> None:
    started_s = time.process_time()
    with suppress(SchemaError):
        read = read_schema(schema, "schema")
        make_up(read, Random(1))
        json_grammar(read, Bounds())
    assert time.process_time() - started_s < 5.0


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "integer", "multipleOf": 3}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": dict.fromkeys(NAMES, True)}, "more than 300 optional"),
        ({"enum": ["x" * 50 + str(i) for i in range(5000)]}, "characters of grammar"),
        ({"type": "string", "pattern": "((a{0,1000}){0,1000}){0,1000}"}, "written out"),
        ({"type": "string", "pattern": "\\x00"}, "control characters"),
        (chain(1, anyOf=[{"$ref": "#/$defs/r1"}, {"type": "null"}]), ""),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_a_grammar_cannot_hold_is_refused(schema: Any, says: str) -> None:
    read = read_schema(schema, "schema")
    if not says:
        assert json_grammar(read, Bounds())
        return
    with pytest.raises(SchemaError, match=re.escape(says)):
        json_grammar(read, Bounds())
    with pytest.raises(SchemaError, match=re.escape(says)):
        call_grammar([("tool", read)], Bounds())


def schemas() -> st.SearchStrategy[Any]:
    text = st.builds(
        lambda least, more, open: (
            {"type": "string", "minLength": least} | ({} if open else {"maxLength": least + more})
        ),
        st.integers(0, 40),
        st.integers(0, 9),
        st.booleans(),
    )
    number = st.builds(
        lambda kind, least, more: {"type": kind, "minimum": least, "maximum": least + more},
        st.sampled_from(["integer", "number"]),
        st.integers(-2000, 2000),
        st.integers(0, 2000),
    )
    leaves = st.one_of(
        text,
        number,
        st.just({"type": "boolean"}),
        st.just({"$ref": "#/$defs/part"}),
        st.lists(st.one_of(st.text(max_size=5), st.integers(-9, 9), st.none()), min_size=1, max_size=4).map(
            lambda values: {"enum": values}
        ),
    )

    def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        objects = st.builds(
            lambda properties, count, extra: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:count],
                **({"additionalProperties": False} if extra else {}),
            },
            st.dictionaries(st.text(max_size=6), inner, max_size=4),
            st.integers(0, 4),
            st.booleans(),
        )
        arrays = st.builds(
            lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
            inner,
            st.integers(0, 3),
            st.integers(0, 3),
        )
        return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=3).map(lambda many: {"anyOf": many}))

    part = {"type": "object", "properties": {"again": {"$ref": "#/$defs/part"}, "n": {"type": "null"}}}
    return st.recursive(leaves, grown, max_leaves=12).map(
        lambda schema: schema if "$ref" in schema else {**schema, "$defs": {"part": part}}
    )


@given(schema=schemas(), seed=st.integers(0, 1 << 30))
@settings(max_examples=examples(40), deadline=None)
def test_any_schema_is_either_kept_or_refused(schema: Any, seed: int) -> None:
    try:
        read = read_schema(schema, "schema")
    except SchemaError:
        return
    Draft202012Validator(schema).validate(json.loads(make_up(read, Random(seed))))
    assert json_grammar(read, Bounds(text_chars=8, items=2)).startswith("root ::= ")


@given(pattern=st.text("ab^$|*+?(){}[]-\\d.,013<P:=! é", max_size=24), seed=st.integers(0, 1 << 30))
@settings(max_examples=examples(200), deadline=None)
def test_any_pattern_is_either_matched_or_refused(pattern: str, seed: int) -> None:
    try:
        read = read_schema({"type": "string", "pattern": pattern}, "schema")
    except SchemaError:
        with pytest.raises(PatternError):
            read_pattern(pattern)
        return
    text = json.loads(make_up(read, Random(seed)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = re.compile(pattern)
        except re.error:
            return  # Python's own patterns differ from ECMAScript's in corners.
    assert compiled.search(text), (pattern, text)
