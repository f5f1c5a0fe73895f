"""Recorded requests read from files: when each came and how long it was.

Owns the two formats that are read, Azure's CSV and Mooncake's JSON lines, and what a line of each
must hold. Reads one line at a time, so a file of any size streams. A line that is not what it
should be is refused with the file's name, the line's number and what was expected: nothing is
skipped, guessed or repaired, because a simulation of half a trace would look like one of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import BinaryIO, NamedTuple

from twostroke.errors import InvalidParameter
from twostroke.sim.lengths import MAX_LENGTH

PREFIX_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length", "hash_ids")

# Far above any real line or length; what is larger is no trace and would only take memory.
_MAX_LINE_BYTES = 2**20
_MAX_TIME_NS = 10**18
_SHOWN = 60

_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d) ([01]\d|2[0-3]):([0-5]\d):([0-5]\d)(?:\.(\d{1,9}))?(?:\+00:00)?",
    re.ASCII,
)
_WHOLE = re.compile(r"-?[0-9]{1,50}")


class Drawn(NamedTuple):
    """One request as recorded, or drawn from a distribution: when it comes and how long it is.

    at_ns: since the start. prefix: one id for each prefix_tokens of the prompt, the last possibly
    cut short; an equal id at an equal place, after equal ones, is equal text. Empty where nothing
    is known to be shared. A tuple and not a dataclass because millions are made.
    """

    at_ns: int
    prompt_tokens: int
    new_tokens: int
    prefix: tuple[int, ...] = ()
    prefix_tokens: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What a whole trace holds.

    duration_ns: from the first request to the last. longest_tokens: prompt and answer of the
    longest. most_prefix_id: -1 where no prompt shares anything.
    """

    requests: int
    duration_ns: int
    prompt_tokens: int
    new_tokens: int
    least_prompt_tokens: int
    longest_tokens: int
    most_prefix_id: int

    @property
    def rate(self) -> float:
        """Requests a second; 0 where all came at once."""
        return (self.requests - 1) * 1e9 / self.duration_ns if self.duration_ns else 0.0


def read_trace(path: Path) -> Iterator[Drawn]:
    """The requests of a trace, in order, one line at a time.

    The format is told by the first line. Raises InvalidParameter, naming the line, when the
    iteration meets what it cannot read.
    """
    try:
        if path.exists() and not path.is_file():
            raise InvalidParameter("trace", f"{path} is no file: give an Azure CSV or JSON lines")
        with path.open("rb") as file:
            yield from _read_lines(path, file)
    except OSError as error:
        why = error.strerror or str(error)
        raise InvalidParameter("trace", f"{path} cannot be read: {why}") from error


def summarise_trace(path: Path) -> TraceSummary:
    """Read a trace to its end, so that a mistake anywhere is known before work begins.

    Raises InvalidParameter.
    """
    requests = prompt_tokens = new_tokens = longest = last_ns = 0
    most_id, least_prompt = -1, MAX_LENGTH
    for one in read_trace(path):
        requests += 1
        prompt_tokens += one.prompt_tokens
        new_tokens += one.new_tokens
        least_prompt = min(least_prompt, one.prompt_tokens)
        longest = max(longest, one.prompt_tokens + one.new_tokens)
        most_id = max(most_id, max(one.prefix, default=-1))
        last_ns = one.at_ns
    return TraceSummary(
        requests, last_ns, prompt_tokens, new_tokens, least_prompt, longest, most_id
    )


class _Refused(Exception):
    """What was expected of a line and what it holds."""


def _read_lines(path: Path, file: BinaryIO) -> Iterator[Drawn]:
    """Requests of an open file. Raises InvalidParameter."""
    lines = _number_lines(path, file)
    number, line = next(lines, (1, ""))
    if not line:
        raise InvalidParameter("trace", f"{path} is empty: expected {_describe_formats()}")
    parse: Callable[[str], Drawn]
    if line.lstrip().startswith("{"):
        parse, rest = _parse_mooncake, _put_back((number, line), lines)
    elif tuple(line.removeprefix("\ufeff").strip().split(",")) == AZURE_COLUMNS:
        parse, rest = _AzureParser(), lines
    else:
        raise _complain(path, number, f"expected {_describe_formats()}, not {_show(line)}")
    first_ns = last_ns = -1
    for number, line in rest:
        try:
            one = parse(line)
            if one.at_ns < last_ns:
                raise _Refused(
                    f"expected a time not before the line above's; it is "
                    f"{(last_ns - one.at_ns) / 1e9:g} s earlier"
                )
        except _Refused as refused:
            raise _complain(path, number, str(refused)) from None
        last_ns = one.at_ns
        if first_ns < 0:
            first_ns = last_ns
        yield one._replace(at_ns=last_ns - first_ns)
    if first_ns < 0:
        raise InvalidParameter("trace", f"{path} holds column names and no request")


def _number_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """The lines as text, numbered from 1; empty ones may only end the file."""
    number = empty = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) == _MAX_LINE_BYTES:
            raise _complain(path, number, f"expected a line under {_MAX_LINE_BYTES:,} bytes")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _complain(
                path, number, f"expected text in UTF-8; byte {error.start + 1} is not"
            ) from None
        if not text.strip():
            empty = empty or number
            continue
        if empty:
            raise _complain(path, empty, "expected a request, not an empty line")
        yield number, text


def _put_back(
    first: tuple[int, str], lines: Iterable[tuple[int, str]]
) -> Iterator[tuple[int, str]]:
    yield first
    yield from lines


class _AzureParser:
    """Lines such as `2023-11-16 18:15:46.6805900,374,44`; remembers the day it last saw."""

    def __init__(self) -> None:
        self._day, self._day_ns = "", 0

    def __call__(self, line: str) -> Drawn:
        cells = line.rstrip("\r\n").split(",")
        if len(cells) != len(AZURE_COLUMNS):
            raise _Refused(
                f"expected {len(AZURE_COLUMNS)} columns ({', '.join(AZURE_COLUMNS)}), "
                f"not {len(cells)}: {_show(line)}"
            )
        return Drawn(
            self._read_time(cells[0]),
            _check_length(AZURE_COLUMNS[1], _read_whole(AZURE_COLUMNS[1], cells[1])),
            _check_length(AZURE_COLUMNS[2], _read_whole(AZURE_COLUMNS[2], cells[2])),
        )

    def _read_time(self, text: str) -> int:
        match = _TIME.fullmatch(text)
        if match is None:
            raise _Refused(
                f"expected a TIMESTAMP such as 2023-11-16 18:15:46.6805900, not {_show(text)}"
            )
        day, hours, minutes, seconds, fraction = match.groups(default="")
        if day != self._day:
            try:
                self._day_ns = date.fromisoformat(day).toordinal() * 86_400 * 10**9
            except ValueError as error:
                raise _Refused(f"expected a day of the calendar: {error}") from None
            self._day = day
        whole = (int(hours) * 60 + int(minutes)) * 60 + int(seconds)
        return self._day_ns + whole * 10**9 + int(fraction.ljust(9, "0"))


def _parse_mooncake(line: str) -> Drawn:
    """An object with MOONCAKE_KEYS; without hash_ids nothing is known to be shared."""
    try:
        fields = json.loads(line, object_pairs_hook=_build_object)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"expected one JSON object on the line: {_explain(error)}") from None
    if not isinstance(fields, dict):
        raise _Refused(f"expected a JSON object, not {_show(line)}")
    missing = [key for key in MOONCAKE_KEYS[:3] if key not in fields]
    unknown = [key for key in fields if key not in MOONCAKE_KEYS]
    if missing or unknown:
        wrong = f"{missing[0]} is missing" if missing else f"{_show(unknown[0])} is unknown"
        raise _Refused(f"expected the keys {', '.join(MOONCAKE_KEYS)}; {wrong}")
    time_ms, prompt, new = (fields[key] for key in MOONCAKE_KEYS[:3])
    if not _is_whole(time_ms) or not 0 <= time_ms * 10**6 <= _MAX_TIME_NS:
        raise _Refused(f"expected timestamp in whole milliseconds from 0, not {_show(time_ms)}")
    prompt, new = _check_length("input_length", prompt), _check_length("output_length", new)
    prefix = _check_prefix(fields.get("hash_ids"), prompt)
    return Drawn(time_ms * 10**6, prompt, new, prefix, PREFIX_BLOCK_TOKENS if prefix else 0)


def _build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object whose keys are given once each; which of two was meant, nobody knows."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"expected each key once; {_show(twice)} comes twice")
    return fields


def _explain(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return str(error)


def _check_prefix(ids: object, prompt_tokens: int) -> tuple[int, ...]:
    if ids is None:
        return ()
    blocks = -(-prompt_tokens // PREFIX_BLOCK_TOKENS)
    if not isinstance(ids, list) or not all(_is_whole(each) and each >= 0 for each in ids):
        raise _Refused(f"expected hash_ids as a list of whole numbers from 0, not {_show(ids)}")
    if len(ids) != blocks:
        raise _Refused(
            f"expected {blocks} hash_ids, one for each {PREFIX_BLOCK_TOKENS} of "
            f"{prompt_tokens:,} tokens, not {len(ids)}"
        )
    return tuple(ids)


def _read_whole(name: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise _Refused(f"expected {name} as a whole number, not {_show(text)}")
    return int(text)


def _check_length(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Refused(f"expected {name} as a whole number, not {_show(value)}")
    if not 1 <= value <= MAX_LENGTH:
        raise _Refused(f"expected {name} from 1 to {MAX_LENGTH:,} tokens, not {_show(value)}")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe_formats() -> str:
    return (
        f"the column names {','.join(AZURE_COLUMNS)}, or JSON objects with "
        f"{', '.join(MOONCAKE_KEYS)}"
    )


def _show(value: object) -> str:
    """A value as it may be printed: short, and with nothing that a terminal would obey."""
    text = repr(value.strip("\r\n") if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _complain(path: Path, number: int, message: str) -> InvalidParameter:
    return InvalidParameter("trace", f"{path.name}, line {number}: {message}")
