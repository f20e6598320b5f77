"""The fields of a chat request that speak of tools and of the answer's form. It knows no endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

FunctionName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
Description = Annotated[StrictStr, Field(max_length=1 << 16)]
GrammarText = Annotated[StrictStr, Field(max_length=1 << 17)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class Function(_Part):
    """parameters: a JSON schema."""

    name: FunctionName
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ToolItem(_Part):
    type: Literal["function"] = "function"
    function: Function


class FunctionReference(_Part):
    name: FunctionName


class NamedTool(_Part):
    type: Literal["function"] = "function"
    function: FunctionReference


class AllowedTools(_Part):
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=256)]


class AllowedToolsChoice(_Part):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice
FunctionCall = Literal["none", "auto"] | FunctionReference
Tools = Annotated[list[ToolItem], Field(max_length=256)]
Functions = Annotated[list[Function], Field(max_length=256)]


class ResponseFormat(_Part):
    """text, json_object, json_schema {name, schema}, regex_schema (or regex), grammar (Lark as llguidance reads it)."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    type: Literal["text", "json_object", "json_schema", "regex_schema", "regex", "grammar"]
    json_schema: dict[str, Any] | None = None
    regex_schema: GrammarText | None = None
    regex: GrammarText | None = None
    grammar: GrammarText | None = None

    def form(self) -> dict[str, Any] | None:
        """As GenerationConfig takes it; None if any text will do."""
        return None if self.type == "text" else self.model_dump(exclude_none=True)
