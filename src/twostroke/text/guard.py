"""Guard: what one rendering of a chat template may use, counted before it is used.

Owns the limits on steps, time, text and numbers, and the versions of Python's growing operations
that respect them. It never makes a value it has not measured; whoever runs a template must route
loops, calls, operators and filters through it (`sandbox`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from twostroke.errors import TemplateError

MAX_SECONDS = 5.0
MAX_STEPS = 500_000
MAX_VALUE_CHARS = 8_000_000
MAX_TOTAL_CHARS = 256_000_000
MAX_BITS = 4096
MAX_WIDTH = 999
ITEM_CHARS = 8  # what an item of a list counts for: the bytes of its reference
MAX_EXPONENT = 4096

_REFUSED_METHODS = frozenset(
    {
        "center",
        "encode",
        "expandtabs",
        "format_map",
        "ljust",
        "rjust",
        "to_bytes",
        "translate",
        "zfill",
    }
)
# A width of more digits than MAX_WIDTH has, or one taken from an argument.
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #.\d]*(\*|\d{4})")
_WIDE_BRACES = re.compile(r"\{[^}]*:[^}]*(\{|\d{4})")
_PLAIN = (str, int, float, type(None), list, tuple, Mapping)


class Guard:
    """Counts what one rendering uses; `begin` starts the next one."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was used so far."""
        self._deadline = time.monotonic() + MAX_SECONDS
        self._steps = 0
        self._chars = 0

    def step(self) -> str:
        """Count one turn of a loop, macro, call or filter. Raises TemplateError past a limit."""
        self._steps += 1
        if self._steps > MAX_STEPS or time.monotonic() > self._deadline:
            raise TemplateError(
                f"the chat template ran for more than {MAX_STEPS:,} steps or {MAX_SECONDS:g} s"
            )
        return ""

    def spend(self, chars: int) -> None:
        """Count text or list items about to be made. Raises TemplateError past a limit."""
        self._chars += chars
        if chars > MAX_VALUE_CHARS or self._chars > MAX_TOTAL_CHARS:
            raise TemplateError(
                f"the chat template made a value of more than {MAX_VALUE_CHARS:,} characters, "
                f"or more than {MAX_TOTAL_CHARS:,} in all"
            )

    def measure(self, value: object) -> int:
        """Size of a value with all it holds, at least; gives up with TemplateError past the limit.

        Namespaces are refused: they are variables of a template, and one inside a list could hold
        that list.
        """
        if isinstance(value, str):
            return len(value)
        total, rest = 0, [value]
        while rest:
            each = rest.pop()
            total += len(each) if isinstance(each, str) else ITEM_CHARS
            if total > MAX_VALUE_CHARS:
                self.spend(total)
            if isinstance(each, Mapping):
                rest += [*each.keys(), *each.values()]
            elif isinstance(each, list | tuple):
                rest += each
            elif not isinstance(each, _PLAIN):
                _refuse_namespace(each)
        return total

    def keep(self, value: Any) -> Any:
        """Count a list, tuple or dict just made, with all it holds; returns it."""
        self.spend(self.measure(value))
        return value

    def join(self, values: Iterable[Any], separator: str = "") -> str:
        """The values as one text."""
        parts = list(values)
        self.spend(sum(map(self.measure, parts)) + len(separator) * len(parts))
        return separator.join(map(str, parts))

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        """text.replace(old, new, count)."""
        found = text.count(old) if count < 0 else min(count, text.count(old))
        self.spend(len(text) + found * len(new))
        return text.replace(old, new, count)

    def write_json(self, value: Any, indent: int | None = None, **options: Any) -> str:
        """JSON as Hugging Face's templates expect it: no HTML escapes, Unicode as it is."""
        unknown = sorted(set(options) - {"ensure_ascii", "separators", "sort_keys"})
        if unknown:
            raise TemplateError(f"the chat template calls tojson with unknown {unknown[0]!r}")
        margin = None if indent is None else min(max(indent, 0), 16)
        self.spend(self.measure(value) * (2 + 6 * (margin or 0)))
        return json.dumps(value, **{"ensure_ascii": False, "indent": margin, **options})

    def operate(self, operator: str, left: Any, right: Any) -> Any:
        """left operator right, for the operators that can make something large or slow."""
        if isinstance(left, int | float) and isinstance(right, int | float):
            return _calculate(operator, left, right)
        match operator:
            case "+":
                self.spend(_get_length(left) + _get_length(right))
                return left + right
            case "%":
                if isinstance(left, str):
                    if _WIDE_PERCENT.search(left):
                        raise TemplateError(
                            f"the chat template formats with a width: {left[:40]!r}"
                        )
                    self.spend(len(left) + left.count("%") * (MAX_WIDTH + self.measure(right)))
                return left % right
            case "*":
                times, value = (left, right) if isinstance(left, int) else (right, left)
                if isinstance(times, int):
                    self.spend(max(times, 0) * _get_length(value))
                return left * right
        raise TypeError(f"{operator} of {type(left).__name__} and {type(right).__name__}")

    def check_call(self, function: Any, arguments: Iterable[Any]) -> None:
        """Count a call. Raises TemplateError for methods that grow a value by a number."""
        self.step()
        name = getattr(function, "__name__", "")
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if not isinstance(owner, str | bytes | int):
            return
        kind = type(owner).__name__
        if name in _REFUSED_METHODS:
            raise TemplateError(f"the chat template calls {kind}.{name}, which is not allowed")
        if isinstance(owner, str) and name == "format":
            if _WIDE_BRACES.search(owner):
                raise TemplateError(f"the chat template formats with a width: {owner[:40]!r}")
            widest = MAX_WIDTH + sum(map(self.measure, arguments))
            self.spend(len(owner) + owner.count("{") * widest)
        elif isinstance(owner, str):
            self.spend(len(owner))


def _calculate(operator: str, left: Any, right: Any) -> Any:
    bits = sum(each.bit_length() for each in (left, right) if isinstance(each, int))
    if operator == "**":
        bits *= 1 if isinstance(left, float) else max(1, int(min(abs(right), MAX_EXPONENT)))
    if bits > MAX_BITS:
        raise TemplateError(f"the chat template makes a number of more than {MAX_BITS} bits")
    match operator:
        case "+":
            return left + right
        case "*":
            return left * right
        case "**":
            return left**right
        case "%":
            return left % right
        case "/":
            return left / right
    return left // right


def _get_length(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return ITEM_CHARS * (len(value) if isinstance(value, Sized) else 1)


def _refuse_namespace(value: object) -> None:
    from jinja2.utils import Namespace

    if isinstance(value, Namespace):
        raise TemplateError("the chat template puts a namespace into a list or writes it out")
