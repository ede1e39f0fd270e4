"""Tools that a request offers, and which of them may or must be called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from chiron.engines.serve.request_error import RequestError, shown
from chiron.engines.serve.schemas.nodes import Schema, SchemaError
from chiron.engines.serve.schemas.schema import Allowance, read_schema

TOOLS_MAX = 128
"""Tools in one request, as in OpenAI's API."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that a model may ask its client to call."""

    name: str
    arguments: Schema
    definition: dict[str, Any]
    """As the client wrote it: chat templates put it into the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The tools of one request."""

    offered: tuple[Tool, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    allowed: tuple[Tool, ...] = ()
    """Those that may be called."""
    several: bool = True
    """Whether one answer may call more than one."""


NO_TOOLS = Tools()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that was made earlier in a conversation."""

    id: str
    name: str
    arguments: str


def read_tools(given: Any, choice: Any, parallel: Any, allowance: Allowance) -> Tools:
    """From ``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a request. Raises RequestError."""
    if parallel is not None and not isinstance(parallel, bool):
        raise RequestError(
            f"parallel_tool_calls is {shown(parallel)}; it must be true or false.", param="parallel_tool_calls"
        )
    if given is None or given == []:
        if choice not in (None, "none", "auto"):
            raise RequestError(f"tool_choice is {shown(choice)}; without tools it must be absent.", param="tool_choice")
        return NO_TOOLS
    if not isinstance(given, list) or len(given) > TOOLS_MAX:
        raise RequestError(f"tools is {shown(given)}; it must be a list of up to {TOOLS_MAX} tools.", param="tools")
    offered: dict[str, Tool] = {}
    for index, tool in enumerate(given):
        read = _tool(tool, f"tools[{index}]", allowance)
        if read.name in offered:
            raise RequestError(f"tools[{index}].function.name is {read.name!r} once more.", param="tools")
        offered[read.name] = read
    mode, names = _choice(choice, offered)
    allowed = tuple(tool for name, tool in offered.items() if name in names)
    return Tools(
        offered=tuple(offered.values()),
        mode=mode,
        allowed=allowed,
        several=parallel is not False and not _names_one(choice),
    )


def read_calls(given: Any, where: str) -> tuple[ToolCall, ...]:
    """From ``tool_calls`` of an assistant's message. Raises RequestError."""
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) > TOOLS_MAX:
        raise RequestError(f"{where} is {shown(given)}; it must be a list of up to {TOOLS_MAX} calls.", param=where)
    calls = []
    for index, call in enumerate(given):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise RequestError(f"{where}[{index}] is {shown(call)}; it must be a call of a function.", param=where)
        id, name, arguments = call.get("id", ""), function.get("name"), function.get("arguments", "")
        if not (isinstance(id, str) and isinstance(name, str) and isinstance(arguments, str)):
            raise RequestError(
                f"{where}[{index}] is {shown(call)}; its id, name and arguments must be strings.", param=where
            )
        calls.append(ToolCall(id=id, name=name, arguments=arguments))
    return tuple(calls)


def _tool(given: Any, where: str, allowance: Allowance) -> Tool:
    if not isinstance(given, dict) or given.get("type") != "function":
        kind = given.get("type") if isinstance(given, dict) else given
        raise RequestError(f"{where}.type is {shown(kind)}; only 'function' is implemented here.", param="tools")
    function = given.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function is {shown(function)}; it must be an object.", param="tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name is {shown(name)}; it must be 1 to 64 letters, digits, '_', '-' or '.'.",
            param="tools",
        )
    place = f"{where}.function.parameters"
    parameters = function.get("parameters")
    if parameters is None or parameters == {}:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise RequestError(f"{place} is {shown(parameters)}; it must be a schema of an object.", param="tools")
    try:
        arguments = read_schema({"type": "object", **parameters}, place, allowance)
    except SchemaError as error:
        raise RequestError(str(error), param="tools", code="invalid_function_parameters") from None
    return Tool(name=name, arguments=arguments, definition=given)


def _choice(given: Any, offered: dict[str, Tool]) -> tuple[Literal["none", "auto", "required"], set[str]]:
    """How much a tool is wanted, and the names of those that may be called."""
    match given:
        case None | "auto":
            return "auto", set(offered)
        case "none":
            return "none", set()
        case "required" | "any":
            return "required", set(offered)
        case {"type": "function", "function": {"name": str(name)}} if name in offered:
            return "required", {name}
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}}:
            named = {t["function"]["name"] for t in tools if isinstance(t, dict) and _is_offered(t, offered)}
            if named and len(named) == len(tools):
                return mode, named
    raise RequestError(
        f"tool_choice is {shown(given)}; it must be 'none', 'auto', 'required', or name tools that are offered: "
        f"{', '.join(list(offered)[:20])}.",
        param="tool_choice",
    )


def _is_offered(tool: dict[str, Any], offered: dict[str, Tool]) -> bool:
    function = tool.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"] in offered


def _names_one(choice: Any) -> bool:
    return isinstance(choice, dict) and choice.get("type") == "function"
