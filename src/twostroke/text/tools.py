"""Tools as a model is told of them, and as its calls are held to them.

Owns what a function is (name, description, the JSON schema of its arguments), the grammar that lets
through nothing but valid calls, and the instructions for models whose template knows no tools: the
functions and the form of a call then stand in the system message, and earlier calls and their
results in the text of other messages. It knows no API's messages beyond what templates read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twostroke.errors import InvalidParameter
from twostroke.text.grammar_limits import style_schema
from twostroke.text.tokenizer import Tokenizer
from twostroke.text.tool_calls import HERMES, ToolForm

MAX_TOOLS = 128
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}

_INSTRUCTIONS = """\
Functions that can help you, one a line, as JSON:
<tools>
{tools}
</tools>
To call one, write an object with its name and its arguments between two tags:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Function:
    """What a model may call. is_strict: its schema is to be obeyed in full, or refused."""

    name: str
    parameters: Mapping[str, Any]
    description: str = ""
    is_strict: bool = False

    def write(self) -> dict[str, Any]:
        """As templates are given it."""
        said = {"description": self.description} if self.description else {}
        function = {"name": self.name, **said, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def read_function(place: str, value: Mapping[str, Any]) -> Function:
    """A function from an object with name, and perhaps description, parameters and strict.

    Raises InvalidParameter naming `place`.
    """
    name, said = value.get("name"), value.get("description")
    parameters, strict = value.get("parameters"), value.get("strict")
    if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
        raise InvalidParameter(
            f"{place}.name", "must have 1 to 64 letters, digits, '_', '-' or '.'"
        )
    if said is not None and not isinstance(said, str):
        raise InvalidParameter(f"{place}.description", "must be a string")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidParameter(f"{place}.parameters", "must be a JSON schema")
    if strict is not None and not isinstance(strict, bool):
        raise InvalidParameter(f"{place}.strict", "must be true or false")
    return Function(name, parameters or _NO_ARGUMENTS, said or "", bool(strict))


def check_functions(functions: Sequence[Function]) -> None:
    """Raise InvalidParameter where there are too many, or two of one name."""
    if len(functions) > MAX_TOOLS:
        raise InvalidParameter("tools", f"must be at most {MAX_TOOLS}, not {len(functions)}")
    names = [function.name for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise InvalidParameter("tools", f"there are two functions named {name}")


# ---- grammars ------------------------------------------------------------------------------------


def write_call_grammar(
    form: ToolForm, functions: Sequence[Function], tokenizer: Tokenizer, *, parallel: bool
) -> str:
    """EBNF of a text that is nothing but calls: one, or with `parallel` any number from one."""
    if form.is_list:
        more = ' (", " call)*' if parallel else ""
        start = f'start: {_write_token(form.opener, tokenizer)} "[" call{more} "]"\ncall: body'
    elif form.closer:
        more = ' ("\\n" call)*' if parallel else ""
        call = f'"{form.opener}\\n" body "\\n{form.closer}"'
        start = f"start: call{more}\ncall: {call}"
    else:
        more = ' ("; " call)*' if parallel else ""
        start = f"start: call{more}\ncall: body"
    return f"{start}\n{_write_bodies(form, functions)}"


def write_free_grammar(form: ToolForm, functions: Sequence[Function], *, parallel: bool) -> str:
    """EBNF of any text with calls in it, each of which is valid; only for a form with a closer."""
    assert form.closer
    start = "call* rest" if parallel else "call | rest"
    lines = [
        f"start: {start}",
        "rest: TEXT",
        r"TEXT: /(.|\n)*/",
        f'head[lazy]: TEXT "{form.opener}"',
        f'call: head "\\n" body "\\n{form.closer}"',
    ]
    return "\n".join(lines) + "\n" + _write_bodies(form, functions)


def _write_bodies(form: ToolForm, functions: Sequence[Function]) -> str:
    """The objects of calls. Each schema is a document of its own, so that its references hold."""
    places = range(len(functions))
    lines = ["body: " + " | ".join(f"call_{place}" for place in places)]
    for place, function in enumerate(functions):
        opening = json.dumps(f'{{"name": {json.dumps(function.name)}, "{form.key}": ')
        schema = style_schema(function.parameters, lenient=not function.is_strict)
        lines.append(f'call_{place}: {opening} arguments_{place} "}}"')
        lines.append(f"arguments_{place}: %json {json.dumps(schema, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _write_token(text: str, tokenizer: Tokenizer) -> str:
    """How a grammar names `text`: by its id where it is a control token."""
    ids = tokenizer.encode(text, add_special=False)
    if len(ids) == 1 and tokenizer.is_control(ids[0]):
        return f"<[{ids[0]}]>"
    return json.dumps(text)


# ---- templates without tools ---------------------------------------------------------------------


def tell_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Messages for a template that knows no tools, with the same said in their texts.

    tools: as templates are given them (see Function.write).
    """
    told = [_tell_calls(message) if speaks_of_tools(message) else message for message in messages]
    if not tools:
        return told
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=lines)
    if told and told[0].get("role") == "system" and isinstance(told[0].get("content"), str):
        told[0] = {**told[0], "content": f"{told[0]['content']}\n\n{text}"}
    else:
        told.insert(0, {"role": "system", "content": text})
    return told


def speaks_of_tools(message: Mapping[str, Any]) -> bool:
    """Whether a message holds calls, or what a tool answered."""
    return isinstance(message, Mapping) and bool(
        message.get("role") == "tool" or message.get("tool_calls")
    )


def _tell_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its calls, or what a tool answered, in its text."""
    content = message.get("content") or ""
    if message.get("role") == "tool":
        text = f"<tool_response>\n{content}\n</tool_response>"
        return {"role": "user", "content": text}
    parts = [content] if content else []
    for call in message["tool_calls"]:
        function = call["function"]
        body = {"name": function["name"], HERMES.key: function["arguments"]}
        parts.append(f"{HERMES.opener}\n{json.dumps(body, ensure_ascii=False)}\n{HERMES.closer}")
    return {"role": "assistant", "content": "\n".join(parts)}


def read_arguments(text: str) -> Any:
    """A call's arguments as templates write them: the object in the text, else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
