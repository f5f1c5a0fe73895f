"""What a request asks of the form of its output, from the fields of the API.

Owns how `response_format`, `structured_outputs`, `tools`, `tool_choice` and `parallel_tool_calls`
become one grammar at most, and which of them an error is about. A combination with two meanings is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from twostroke.errors import InvalidParameter
from twostroke.server.generation import rename_parameter
from twostroke.server.schemas import ChatFields, CommonFields
from twostroke.text.grammar import StructuredOutputs, read_structured_outputs
from twostroke.text.grammar_limits import style_schema
from twostroke.text.tokenizer import Tokenizer
from twostroke.text.tool_calls import ToolForm
from twostroke.text.tools import (
    Function,
    check_functions,
    read_function,
    write_call_grammar,
    write_free_grammar,
)

_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What the output must match, None for anything, and the field that asks for it."""

    structured: StructuredOutputs | None = None
    field: str = "structured_outputs"

    @property
    def public_names(self) -> dict[str, str]:
        """For errors: what the API calls `structured_outputs`."""
        return {"structured_outputs": self.field}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions a model is shown, those it may call, and whether it must call one."""

    shown: Sequence[Function] = ()
    callable: Sequence[Function] = ()
    must_call: bool = False
    parallel: bool = True


def read_output_form(common: CommonFields) -> OutputForm:
    """What the fields of both APIs ask for. Raises: InvalidParameter."""
    wanted, given = common.response_format, common.structured_outputs
    if wanted is None or wanted.type == "text":
        if wanted is not None and wanted.json_schema is not None:
            raise InvalidParameter("response_format.json_schema", 'needs type "json_schema"')
        return OutputForm(read_structured_outputs(given))
    if given is not None:
        raise InvalidParameter("structured_outputs", "cannot be sent beside response_format")
    schema: Any = {"type": "object"}
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidParameter("response_format.json_schema", "is missing")
        schema = wanted.json_schema.schema_
    try:
        return OutputForm(StructuredOutputs(json=schema or True), "response_format")
    except InvalidParameter as error:
        raise rename_parameter(error, {error.parameter: "response_format"}) from None


def read_tool_use(own: ChatFields) -> ToolUse:
    """What `tools` and `tool_choice` ask for. Raises: InvalidParameter."""
    functions = []
    for place, tool in enumerate(own.tools or ()):
        if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise InvalidParameter(
                f"tools.{place}", 'must have type "function" and an object named function'
            )
        functions.append(read_function(f"tools.{place}.function", tool["function"]))
    check_functions(functions)
    choice = own.tool_choice if own.tool_choice is not None else "auto"
    parallel = own.parallel_tool_calls is not False
    if isinstance(choice, dict):
        named = choice.get("function")
        name = named.get("name") if isinstance(named, dict) else None
        chosen = [function for function in functions if function.name == name]
        if choice.get("type") != "function" or not chosen:
            raise InvalidParameter("tool_choice", "must name one of the functions of tools")
        return ToolUse(functions, chosen, True, False)
    if choice not in _CHOICES:
        raise InvalidParameter(
            "tool_choice", f"must be one of {', '.join(_CHOICES)}, or name a function"
        )
    if choice == "required" and not functions:
        raise InvalidParameter("tool_choice", "is required but there are no tools")
    if choice == "none":
        return ToolUse()
    return ToolUse(functions, functions, choice == "required", parallel)


def join_tools(form: OutputForm, use: ToolUse, calls: ToolForm, tokenizer: Tokenizer) -> OutputForm:
    """The form of an output that may hold calls. Raises: InvalidParameter."""
    if not use.callable:
        return form
    if form.field == "structured_outputs" and form.structured is not None:
        raise InvalidParameter("structured_outputs", "cannot be sent beside tools")
    parallel = use.parallel
    if use.must_call or form.structured is not None:
        grammar = write_call_grammar(calls, use.callable, tokenizer, parallel=parallel)
        if not use.must_call:
            grammar = _add_answer(grammar, form)
    elif calls.closer:
        grammar = write_free_grammar(calls, use.callable, parallel=parallel)
    else:  # no text shows that a call begins until it has: it is read, and not held to a form
        return form
    try:
        return OutputForm(StructuredOutputs(grammar=grammar), "tools")
    except InvalidParameter as error:
        raise rename_parameter(error, {error.parameter: "tools"}) from None


def _add_answer(grammar: str, form: OutputForm) -> str:
    """Calls, or else an answer of the form that was asked for."""
    assert form.structured is not None
    schema = form.structured.json
    styled = style_schema(schema if isinstance(schema, dict) else {})
    answer = f"answer: %json {json.dumps(styled, ensure_ascii=False)}\n"
    return grammar.replace("start:", "start: answer | calls\ncalls:", 1) + answer
