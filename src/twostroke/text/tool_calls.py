"""Tool calls in a model's text: the forms models write them in, and a reader of each.

Owns the forms (chosen by what the chat template itself writes) and an incremental reader: pieces of
text in, content and parts of calls out. How the text is cut into pieces changes nothing: what comes
out, joined, is the same. Nothing is lost: text that began like a call and turned out to be none is
content, and arguments that are no JSON are passed on as they are. It knows no API's messages.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

_NAME = "name"
_ARGUMENTS = frozenset({"arguments", "parameters"})
_OTHER_KEYS = frozenset({"type", "id"})
_BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How calls are written.

    opener: begins them, wherever it stands in the text. bare: begins them too, at the very start of
    the text, where the opener is a control token that is not shown or there is none. closer: ends
    each call. is_list: calls are the items of one JSON list. key: what their arguments are called.
    """

    opener: str
    bare: str
    closer: str
    is_list: bool
    key: str


HERMES = ToolForm("<tool_call>", "", "</tool_call>", False, "arguments")
LLAMA3 = ToolForm("<|python_tag|>", "{", "", False, "parameters")
MISTRAL = ToolForm("[TOOL_CALLS]", "[{", "", True, "arguments")


def knows_tools(template_source: str) -> bool:
    """Whether a chat template shows tools to its model."""
    return re.search(r"\btools\b", template_source) is not None


def find_tool_form(template_source: str) -> ToolForm:
    """The form that a chat template writes calls in; Hermes' where it writes none known."""
    for form in (MISTRAL, HERMES, LLAMA3):
        if form.opener in template_source and knows_tools(template_source):
            return form
    if '"parameters": ' in template_source and knows_tools(template_source):
        return LLAMA3
    return HERMES


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call, counted from 0, to a function of this name."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are JSON text."""

    index: int
    text: str


ToolEvent = Content | CallStarted | CallArguments


class _At(enum.Enum):
    """Where a reader stands."""

    TEXT = "outside of calls"
    OPENED = "behind an opener"
    CALL = "inside a call's object"
    AFTER = "behind a call's object"


class ToolCallReader:
    """Reads one text. `num_calls`: calls begun so far."""

    def __init__(self, form: ToolForm) -> None:
        self.num_calls = 0
        self._form = form
        self._at = _At.TEXT
        self._raw = ""  # text not passed on yet, in case it is content after all
        self._is_start = True
        self._call = _CallObject()

    def feed(self, text: str) -> list[ToolEvent]:
        """What `text` adds."""
        return _join(event for char in text for event in self._take(char))

    def finish(self) -> list[ToolEvent]:
        """What is left when the text has ended."""
        raw, self._raw = self._raw, ""
        announced = self._at is _At.CALL and self._call.name is not None
        if announced or self._at is _At.AFTER or (self.num_calls and not raw.strip()):
            return []
        return [Content(raw)] if raw else []

    def _take(self, char: str) -> Iterator[ToolEvent]:
        if self._at is _At.CALL:
            yield from self._take_call(char)
            return
        self._raw += char
        if self._at is _At.TEXT:
            yield from self._take_text()
        elif self._at is _At.OPENED:
            yield from self._take_opened(char)
        else:
            yield from self._take_after(char)

    def _take_text(self) -> Iterator[ToolEvent]:
        """Pass on what can no longer begin a call, or be the blanks before one."""
        form, raw = self._form, self._raw
        if raw.endswith(form.opener):
            before = raw.removesuffix(form.opener).rstrip()
            if before:
                yield Content(before)
            self._raw, self._at, self._is_start = raw[len(before) :], _At.OPENED, False
            return
        if self._is_start and form.bare:
            begun = raw.lstrip()
            if begun == form.bare:
                self._at, self._is_start = _At.OPENED, False
                yield from self._take_opened("{")
                return
            if form.bare.startswith(begun):
                return
        kept = _measure_overlap(raw, form.opener)
        text = raw[: len(raw) - kept].rstrip()
        if text:
            self._is_start = False
            yield Content(text)
            self._raw = raw[len(text) :]

    def _take_opened(self, char: str) -> Iterator[ToolEvent]:
        if char == "{":
            self._at, self._call = _At.CALL, _CallObject()
            yield from self._call.take(char, self.num_calls)
        elif not (char.isspace() or (char == "[" and self._form.is_list)):
            yield from self._give_up()

    def _take_call(self, char: str) -> Iterator[ToolEvent]:
        call = self._call
        if call.name is None:
            self._raw += char
        yield from call.take(char, self.num_calls)
        if call.is_broken or (call.is_over and call.name is None):
            yield from self._give_up()
            return
        if call.name is not None:
            self._raw = ""
        if call.is_over:
            self.num_calls += 1
            self._at = _At.AFTER

    def _take_after(self, char: str) -> Iterator[ToolEvent]:
        form = self._form
        closer = form.closer or ("]" if form.is_list else "")
        seen = self._raw.strip(_BLANKS if form.closer else _BLANKS + ",;")
        if seen == "{" and not form.closer:
            yield from self._take_opened(char)
        elif seen and seen == closer:
            self._raw, self._at = "", _At.TEXT
        elif not closer.startswith(seen):
            self._at = _At.TEXT
            yield from self._take_text()

    def _give_up(self) -> Iterator[ToolEvent]:
        """What looked like a call is content."""
        text, self._raw, self._at, self._is_start = self._raw, "", _At.TEXT, False
        if text:
            yield Content(text)


class _CallObject:
    """Follows the JSON object of one call, character by character.

    Its members may come in any order; arguments are passed on once the name is known. is_broken:
    it is no call. is_over: its last brace was read.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_over = self.is_broken = False
        self._depth = 0  # of the value that is being read
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._token = ""  # the key or value so far, where it is kept
        self._arguments = ""  # not passed on yet
        self._has_arguments = self._announced = False
        self._expects = "{"

    def take(self, char: str, index: int) -> Iterator[ToolEvent]:
        """What this character adds to call `index`."""
        if self._expects == "value":
            self._take_value(char)
        elif self._expects == "key" and (self._in_string or char == '"'):
            self._take_key(char)
        elif not char.isspace():
            self._take_mark(char)
        if self.name is not None and not self.is_broken:
            yield from self._pass_on(index)

    def _take_mark(self, char: str) -> None:
        """One of the signs between keys and values."""
        if self._expects == "{" and char == "{":
            self._expects = "key"
        elif self._expects == ":" and char == ":":
            self._expects, self._token, self._depth = "value", "", 0
        elif self._expects == "," and char == ",":
            self._expects = "key"
        elif self._expects in (",", "key") and char == "}":
            self.is_over = True
        elif self.name is None:
            self.is_broken = True
        elif char == "}":  # else what is wrong behind the name is passed over
            self.is_over = True

    def _take_key(self, char: str) -> None:
        self._token += char
        if self._in_string and not self._escaped and char == '"':
            self._key, self._expects = _read_string(self._token), ":"
            known = self._key == _NAME or self._key in _ARGUMENTS or self._key in _OTHER_KEYS
            self.is_broken = self.name is None and not known
            self._in_string, self._token = False, ""
            return
        self._escaped = self._in_string and not self._escaped and char == "\\"
        self._in_string = True

    def _take_value(self, char: str) -> None:
        token, bare = self._token, not self._in_string
        if not token and char.isspace():
            return
        if bare and self._depth == 0 and token and char in ",}":
            self._end_value()
            self._expects = ","
            self._take_mark(char)
            return
        self._token += char
        if self._key in _ARGUMENTS and not self._token.startswith('"'):
            self._has_arguments = True
            self._arguments += "" if bare and self._depth == 0 and char.isspace() else char
        if self._in_string:
            ends = char == '"' and not self._escaped
            self._escaped = char == "\\" and not self._escaped
            self._in_string = not ends
        elif char == '"':
            self._in_string = True
        else:
            self._depth += (char in "{[") - (char in "}]")

    def _end_value(self) -> None:
        token, self._token = self._token.rstrip(), ""
        if self._key == _NAME and self.name is None:
            self.name = _read_string(token)
            self.is_broken = not self.name
        elif self._key in _ARGUMENTS and token.startswith('"'):  # JSON text inside of a string
            self._has_arguments = True
            self._arguments += _read_string(token) or token

    def _pass_on(self, index: int) -> Iterator[ToolEvent]:
        """Arguments known by now, behind the name the first time."""
        assert self.name is not None
        if not self._announced:
            self._announced = True
            yield CallStarted(index, self.name)
        if self.is_over and not self._has_arguments:
            self._arguments = "{}"
        if self._arguments:
            yield CallArguments(index, self._arguments)
            self._arguments = ""


def _read_string(token: str) -> str | None:
    """A JSON string's text; None where it is none."""
    try:
        value = json.loads(token)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _measure_overlap(text: str, opener: str) -> int:
    """Characters at the end of `text` that may be the beginning of `opener`."""
    for count in range(min(len(text), len(opener) - 1), 0, -1):
        if opener.startswith(text[-count:]):
            return count
    return 0


def _join(events: Iterator[ToolEvent]) -> list[ToolEvent]:
    """The events with neighbours of one kind and call made one."""
    joined: list[ToolEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif (
            isinstance(event, CallArguments)
            and isinstance(last, CallArguments)
            and event.index == last.index
        ):
            joined[-1] = CallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined
