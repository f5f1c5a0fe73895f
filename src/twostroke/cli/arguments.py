"""Reads an ordinary command line into groups of options, without any library.

Loading typer and what it stands on takes 80 ms, a third of the time to the first token. So what is
written plainly is read here: values as digits or text, names in full. Whatever else there may be,
from `--help` to a mistake, is left to typer as a whole; what both read means the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from twostroke.cli.options import get_names, get_shown

_WHOLE = re.compile(r"[0-9]{1,18}")
_DECIMAL = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")
_FLAGS = ("bool", "bool | None")
_LISTS = ("list[str] | None",)


class _NotPlain(Exception):
    """Typer must look at this."""


def read_arguments(words: Sequence[str], groups: Sequence[type[Any]]) -> list[Any] | None:
    """A value of each group; None where typer must read these words."""
    try:
        values = _read_values(
            iter(words), [each for group in groups for each in _get_fields(group)]
        )
    except _NotPlain:
        return None
    return [
        group(
            **{each.name: values[each.name] for each in _get_fields(group) if each.name in values}
        )
        for group in groups
    ]


def _get_fields(group: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(group)


def _read_values(words: Iterator[str], fields: Sequence[dataclasses.Field[Any]]) -> dict[str, Any]:
    """What the words say, by name of the field."""
    wanted = [each for each in fields if get_shown(each).is_argument]
    options = {name: each for each in fields for name in _split_names(each)}
    values: dict[str, Any] = {}
    for word in words:
        if not word.startswith("-"):
            if not wanted:
                raise _NotPlain
            values[wanted.pop(0).name] = word
            continue
        name, has_value, value = word.partition("=")
        field = options.get(name)
        if field is None or (has_value and not name.startswith("--")):
            raise _NotPlain
        if field.type in _FLAGS:
            if has_value:
                raise _NotPlain
            values[field.name] = not any(each.endswith("/" + name) for each in get_names(field))
            continue
        if not has_value:
            value = next(words, "-")
            if value.startswith("-"):
                raise _NotPlain
        if field.type in _LISTS:
            values.setdefault(field.name, []).append(value)
        else:
            values[field.name] = _read_value(field, value)
    if wanted:
        raise _NotPlain
    return values


def _split_names(field: dataclasses.Field[Any]) -> Iterator[str]:
    if not get_shown(field).is_argument:
        for name in get_names(field):
            yield from name.split("/")


def _read_value(field: dataclasses.Field[Any], word: str) -> str | int | float:
    shown = get_shown(field)
    match field.type:
        case "str" | "str | None":
            return word
        case "int" | "int | None" if _WHOLE.fullmatch(word):
            number = int(word)
            low = number if shown.least is None else shown.least
            high = number if shown.most is None else shown.most
            if low <= number <= high:
                return number
        case "float" | "float | None" if _DECIMAL.fullmatch(word):
            return float(word)
    raise _NotPlain
