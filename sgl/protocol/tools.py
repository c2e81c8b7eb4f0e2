"""The functions a client offers to the model: `tools` and `tool_choice`, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from sgl.errors import InvalidRequestError
from sgl.protocol.body import one_of

MAX_TOOLS = 1024
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


class Function(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A function that the model may ask to be called.

    name         1 to 128 letters, digits and _ . -
    description  for the model
    parameters   a JSON schema of the arguments' object; without it there are no arguments
    strict       arguments always match the schema
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """What the model may use.

    function  to be called
    type      functions only
    """

    function: Function
    type: Annotated[str, one_of("function")] = "function"


class ChosenFunction(msgspec.Struct, kw_only=True):
    """A function by its name.

    name   that of one of tools
    """

    name: str


class ChosenTool(msgspec.Struct, kw_only=True):
    """What the model must use.

    function  to be called
    type      functions only
    """

    function: ChosenFunction
    type: Annotated[str, one_of("function")] = "function"


Choice: TypeAlias = Literal["auto", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What the model may call.

    tools     those shown to the model
    callable  those it may call; fewer where the client named one
    choice    auto: if it likes; required: it must
    """

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    choice: Choice
    max_calls: int | None = None

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.callable)

    @property
    def is_strict(self) -> bool:
        """A client wants arguments that match, whenever there are some."""
        return any(tool.function.strict for tool in self.callable)

    def shown(self) -> list[dict[str, Any]]:
        """As templates know them."""
        return [_shown(tool) for tool in self.tools]


def tool_use(
    tools: Sequence[Tool], choice: str | ChosenTool | None, parallel: bool | None
) -> ToolUse | None:
    """What these fields of a request ask for; None: the model is not to see tools.

    Raises InvalidRequestError.
    """
    check_tools(tools)
    if not tools:
        if choice in (None, "none"):
            return None
        raise InvalidRequestError(
            "tool_choice needs tools: give tools, or leave out tool_choice", param="tool_choice"
        )
    at_most_one = 1 if parallel is False else None
    match choice:
        case "none":
            return None
        case None | "auto":
            return _use(tools, tools, "auto", at_most_one)
        case "required":
            return _use(tools, tools, "required", at_most_one)
        case ChosenTool():
            return _use(tools, [_chosen(choice, tools)], "required", 1)
        case _:
            raise InvalidRequestError(
                f"tool_choice {choice!r:.40} is not known: it is auto, none, required or "
                '{"type": "function", "function": {"name": …}}',
                param="tool_choice",
            )


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises InvalidRequestError for what is no function, or has a name or schema of no use."""
    if len(tools) > MAX_TOOLS:
        raise _refused(f"{len(tools)} tools, a request may have {MAX_TOOLS}", "tools")
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        if tool.type != "function":
            raise _refused(f"{place} has the type {tool.type!r:.40}, not function", f"{place}.type")
        name = tool.function.name
        if not _NAME.fullmatch(name):
            raise _refused(
                f"{place} is called {name!r:.150}: a name has 1 to 128 letters, digits and _ . -",
                f"{place}.function.name",
            )
        if name in seen:
            raise _refused(f"two tools are called {name}", f"{place}.function.name")
        seen.add(name)
        _check_parameters(tool.function.parameters or {}, f"{place}.function.parameters")


def _check_parameters(schema: dict[str, Any], place: str) -> None:
    """What is wrong in any case. A grammar finds the rest when it is compiled."""
    if schema.get("type", "object") != "object":
        raise _refused(f"{place} must have the type object: arguments have names", f"{place}.type")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict) or not all(
        isinstance(each, dict | bool) for each in properties.values()
    ):
        raise _refused(f"{place}.properties must map names to schemas", f"{place}.properties")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        raise _refused(f"{place}.required must be a list of names", f"{place}.required")


def _chosen(choice: ChosenTool, tools: Sequence[Tool]) -> Tool:
    name = choice.function.name
    for tool in tools:
        if tool.function.name == name and choice.type == "function":
            return tool
    names = ", ".join(tool.function.name for tool in tools)
    raise InvalidRequestError(
        f"tool_choice names the {choice.type:.40} {name!r:.150}, and tools has the functions "
        f"{names:.1000}",
        param="tool_choice",
    )


def _use(
    tools: Sequence[Tool], callable: Sequence[Tool], choice: Choice, max_calls: int | None
) -> ToolUse:
    return ToolUse(tools=tuple(tools), callable=tuple(callable), choice=choice, max_calls=max_calls)


def _shown(tool: Tool) -> dict[str, Any]:
    function = msgspec.to_builtins(tool.function)
    function.pop("strict", None)  # for us, not for the model
    return {"type": "function", "function": function}


def _refused(why: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(why, param=param)
