"""Recordings as files: JSON lines, the header first, then one input a line, in order.

Owns the form of frozen messages as plain values, by their fields and types: a field that has its
default is left out, so a message that gains a field reads older files. The same message always
gives the same bytes. A file is read strictly: a line that is not what it should be is refused with
its number, because a replay of half a recording would look like one of the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from twostroke.engine.recording import (
    ENDINGS,
    VERSION,
    Attach,
    Cancel,
    Commit,
    Header,
    Input,
    Lose,
    Plan,
    Recording,
    Release,
    Submit,
)
from twostroke.errors import InvalidParameter

KINDS: Mapping[str, type[Any]] = {
    "submit": Submit,
    "cancel": Cancel,
    "plan": Plan,
    "commit": Commit,
    "lose": Lose,
    "attach": Attach,
    "release": Release,
}
_SHOWN = 60


class _Refused(Exception):
    """What is wrong with a value."""


def encode(value: object) -> bytes:
    """A message as bytes; equal messages give equal bytes."""
    return json.dumps(to_plain(value), separators=(",", ":")).encode()


def to_plain(value: Any) -> Any:
    """A value as JSON has them: messages by field, without those that have their default."""
    if dataclasses.is_dataclass(value):
        plain = {}
        for field in dataclasses.fields(value):
            one = getattr(value, field.name)
            if field.default is dataclasses.MISSING or one != field.default:
                plain[field.name] = to_plain(one)
        return plain
    if isinstance(value, tuple):
        return [to_plain(one) for one in value]
    if isinstance(value, frozenset):
        return sorted(value)
    return value.hex() if isinstance(value, bytes) else value


def write_recording(recording: Recording, path: Path) -> None:
    """Write a recording, whole or not at all. Raises InvalidParameter where it cannot be."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(encode({"recording": to_plain(recording.header)}) + b"\n")
            for one in recording.inputs:
                file.write(encode({type(one).__name__.lower(): to_plain(one)}) + b"\n")
        partial.replace(path)
    except OSError as error:
        why = error.strerror or str(error)
        raise InvalidParameter("record", f"{path} cannot be written: {why}") from error
    finally:
        with contextlib.suppress(OSError):  # mostly it is gone, or never came to be
            partial.unlink()


def read_recording(path: Path) -> Recording:
    """A recording that was written. Raises InvalidParameter, naming the line that is wrong."""
    try:
        lines = _read_lines(path)
        header = next(lines, None)
        if not isinstance(header, Header):
            raise InvalidParameter("recording", f"{path} is empty")
        return Recording(header, tuple(lines))
    except OSError as error:
        why = error.strerror or str(error)
        raise InvalidParameter("recording", f"{path} cannot be read: {why}") from error


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith(b"\n"):
                    raise _Refused("is cut short")
                yield _read_header(line) if number == 1 else _read_input(line)
            except _Refused as refused:
                shown = line[:_SHOWN].decode("utf-8", "replace").rstrip()
                raise InvalidParameter(
                    "recording", f"{path}, line {number}: {refused}: {shown}"
                ) from None


def _read_header(line: bytes) -> Header:
    plain = _read_object(line)
    if list(plain) != ["recording"] or not isinstance(plain["recording"], dict):
        raise _Refused('must be {"recording": …}, the header')
    version = plain["recording"].get("version", VERSION)
    if version != VERSION:
        raise _Refused(f"is of version {version}; only version {VERSION} can be read")
    header: Header = _from_plain(Header, plain["recording"], "recording")
    return header


def _read_input(line: bytes) -> Input:
    plain = _read_object(line)
    kind = next(iter(plain), "")
    if len(plain) != 1 or kind not in KINDS:
        raise _Refused(f"must be an object with one of {', '.join(KINDS)}")
    one: Input = _from_plain(KINDS[kind], plain[kind], kind)
    if isinstance(one, Cancel) and one.ending not in ENDINGS:
        raise _Refused(f"cancel.ending must be one of {', '.join(ENDINGS)}")
    if isinstance(one, Plan) and (one.plan is None) == (one.idle is None):
        raise _Refused("plan must hold a plan or say why there is none")
    return one


def _read_object(line: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"is no JSON ({error})") from None
    if not isinstance(plain, dict):
        raise _Refused("must be an object")
    return plain


def _from_plain(hint: Any, plain: Any, where: str) -> Any:
    """The value of a type from its plain form. Raises _Refused, naming the field."""
    if hint is Any:
        return plain
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, plain, where)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if plain is None and type(None) in inner:
            return None
        [wanted] = [one for one in inner if one is not type(None)]
        return _from_plain(wanted, plain, where)
    if origin is tuple:
        return _build_tuple(inner, plain, where)
    if origin is frozenset and isinstance(plain, list):
        return frozenset(_build_tuple((*inner, ...), plain, where))
    if origin is not None and isinstance(plain, dict):  # a mapping from strings
        return {key: _from_plain(inner[1], one, f"{where}.{key}") for key, one in plain.items()}
    if hint is float and type(plain) is int:
        return float(plain)
    if hint is bytes and type(plain) is str:
        try:
            return bytes.fromhex(plain)
        except ValueError:
            raise _Refused(f"{where} must be bytes in hexadecimal digits") from None
    if type(plain) is not hint:
        name = getattr(hint, "__name__", str(hint))
        raise _Refused(f"{where} must be of type {name}, not {json.dumps(plain)[:_SHOWN]}")
    return plain


def _build(kind: type[Any], plain: Any, where: str) -> Any:
    if not isinstance(plain, dict):
        raise _Refused(f"{where} must be an object")
    hints, needed = _get_fields(cast(Hashable, kind))
    for name in plain:
        if name not in hints:
            raise _Refused(f"{where} has no {name!r}")
    for name in needed:
        if name not in plain:
            raise _Refused(f"{where} lacks {name!r}")
    values = {name: _from_plain(hints[name], one, f"{where}.{name}") for name, one in plain.items()}
    return kind(**values)


def _build_tuple(inner: tuple[Any, ...], plain: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(plain, list):
        raise _Refused(f"{where} must be a list")
    if len(inner) == 2 and inner[1] is ...:
        # Most of a recording is lists of integers.
        if inner[0] is int and set(map(type, plain)) <= {int}:
            return tuple(plain)
        return tuple(_from_plain(inner[0], one, where) for one in plain)
    if len(plain) != len(inner):
        raise _Refused(f"{where} must be a list of {len(inner)}")
    return tuple(_from_plain(each, one, where) for each, one in zip(inner, plain, strict=True))


@cache
def _get_fields(kind: type[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Types of the fields of a message, and those it cannot do without."""
    needed = tuple(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return get_type_hints(kind), needed
