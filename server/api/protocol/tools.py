"""The fields of tools: what may be called, and whether it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from server.api.protocol.generation import GenerationRequest
from server.api.protocol.model import RequestModel, Text

MAX_TOOLS = 128
NAME = r"^[A-Za-z0-9_-]{1,64}$"
MODES = ("none", "auto", "required")
_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})


@dataclass(frozen=True)
class ToolChoice:
    """Whether a tool is called. ``names`` are the tools that may be, None for all; ``once``: only one call."""

    mode: str
    names: tuple[str, ...] | None = None
    once: bool = False


class FunctionDefinition(RequestModel):
    """A function; ``parameters`` is the JSON schema of its arguments, which are none if it is left out."""

    name: Annotated[str, Field(pattern=NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @model_validator(mode="after")
    def _parameters_are_an_object(self) -> Self:
        if (self.parameters or {}).get("type", "object") != "object":
            raise PydanticCustomError("schema", "its type should be 'object'", {"field": "parameters"})
        return self


class ToolDefinition(RequestModel):
    """A tool of a request."""

    type: Literal["function"]
    function: FunctionDefinition

    def as_json(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        function = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": parameters,
        }
        return {"type": "function", "function": function}


def _functions_only(value: object) -> object:
    if isinstance(value, dict) and value.get("type") not in (None, "function"):
        raise PydanticCustomError("unsupported", "only tools of type 'function' are supported", {"field": "type"})
    return value


def _parse_choice(value: object) -> ToolChoice:
    """OpenAI's ``tool_choice``: a mode, one function, or ``allowed_tools``."""
    if isinstance(value, str) and value in MODES:
        return ToolChoice(value)
    if isinstance(value, dict) and value.get("type") == "function":
        return ToolChoice("required", (_function_name(value, "function.name"),), once=True)
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        return _parse_allowed(value.get("allowed_tools"))
    raise PydanticCustomError(
        "tool_choice",
        "it should be 'none', 'auto' or 'required', or an object of type 'function' or 'allowed_tools'",
    )


def _parse_allowed(value: object) -> ToolChoice:
    if not isinstance(value, dict) or value.get("mode") not in ("auto", "required"):
        raise PydanticCustomError("mode", "it should be 'auto' or 'required'", {"field": "allowed_tools.mode"})
    tools = value.get("tools")
    if not isinstance(tools, list) or not 0 < len(tools) <= MAX_TOOLS:
        message = f"it should be an array of 1 to {MAX_TOOLS} tools"
        raise PydanticCustomError("tools", message, {"field": "allowed_tools.tools"})
    names = (_function_name(tool, f"allowed_tools.tools[{number}].function.name") for number, tool in enumerate(tools))
    return ToolChoice(value["mode"], tuple(dict.fromkeys(names)))


def _function_name(value: object, field: str) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise PydanticCustomError("name", "it should be the name of a tool", {"field": field})
    return name


class ToolFields(GenerationRequest):
    """``tools``, ``tool_choice`` and ``parallel_tool_calls``."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        name: values for name, values in GenerationRequest.neutral.items() if name not in _FIELDS
    }

    tools: Annotated[list[Annotated[ToolDefinition, BeforeValidator(_functions_only)]], Field(max_length=MAX_TOOLS)] = (
        Field(default_factory=list)
    )
    tool_choice: Annotated[ToolChoice | None, PlainValidator(_parse_choice)] = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _tools_are_there(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        for number, name in enumerate(names):
            if name in names[:number]:
                field = f"tools[{number}].function.name"
                raise PydanticCustomError("twice", "the name stands twice in 'tools'", {"field": field})
        choice = self.tool_choice
        if choice is None:
            return self
        if not names and choice.mode == "required":
            raise PydanticCustomError("tools", "it needs tools in 'tools'", {"field": "tool_choice"})
        for name in choice.names or ():
            if name not in names:
                raise PydanticCustomError("tool_choice", "it names no tool of 'tools'", {"field": "tool_choice"})
        return self

    @property
    def callable_tools(self) -> list[tuple[int, ToolDefinition]]:
        """The tools that may be called, each with its place in ``tools``."""
        choice = self.tool_choice or ToolChoice("auto")
        if choice.mode == "none":
            return []
        allowed = [(place, tool) for place, tool in enumerate(self.tools)]
        return [entry for entry in allowed if choice.names is None or entry[1].function.name in choice.names]

    @property
    def several_calls(self) -> bool:
        """Whether an answer may have more than one call; a named function is called once.

        By default an answer that has to be a call is one call: small models that may go on seldom stop.
        """
        if self.tool_choice is not None and self.tool_choice.once:
            return False
        return not self.must_call if self.parallel_tool_calls is None else self.parallel_tool_calls

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice is not None and self.tool_choice.mode == "required"
