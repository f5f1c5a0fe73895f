"""Question: an exercise with its numbers drawn, and the grading of an answer in words.

An answer is a number with its unit, and where the question asks for it one of a few words. Units of
one kind are converted; a number without the unit that it needs is refused, and so is a near miss:
`tolerance` is for rounding and no more, and whole things are counted exactly.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from twostroke.errors import InvalidParameter

_NUMBER = re.compile(r"[-+]?([0-9][0-9,_]*(\.[0-9]+)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_BYTES = {"byte": 1.0, "bytes": 1.0, "b": 1.0}
_BYTES |= {f"{letter}b": 1000.0**power for power, letter in enumerate("kmgt", 1)}
_BYTES |= {f"{letter}ib": 1024.0**power for power, letter in enumerate("kmgt", 1)}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_KINDS = {"bytes": _BYTES, "s": _SECONDS}
ROUNDING = 0.005  # the most that rounding to three digits changes


@dataclass(frozen=True, slots=True)
class Question:
    """An exercise. answer: in `unit`, which is "bytes", "s" or a name that may be left out.

    tolerance: relative; 0 where things are counted. words: of which the answer must hold `word`.
    """

    text: str
    answer: float
    unit: str
    derivation: str
    tolerance: float = ROUNDING
    words: tuple[str, ...] = ()
    word: str = ""


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether an answer is right, and what is said of it."""

    is_right: bool
    told: str


def grade(question: Question, answer: str) -> Grade:
    """Judge an answer. Raises InvalidParameter for one that holds no number, or not its unit."""
    number, unit = _read(answer)
    value = number * _get_factor(question, unit)
    given = [word for word in question.words if word in answer.lower()]
    if question.words and len(given) != 1:
        raise InvalidParameter("answer", f"must also say one of: {', '.join(question.words)}")
    if question.words and given != [question.word]:
        return Grade(False, f"Not right: it is {question.word}.")
    off = abs(value - question.answer) / max(abs(question.answer), 1e-300)
    if off <= question.tolerance + 1e-12:
        return Grade(True, "Right.")
    told = f"Not right: {format_value(question.answer, question.unit)}"
    return Grade(False, f"{told}; yours is {off:.1%} off." if off < 1 else f"{told}.")


def format_value(value: float, unit: str) -> str:
    """A value in the unit that it is told in."""
    if unit == "bytes":
        return f"{value:,.0f} bytes"
    if unit == "s" and value < 1:
        return f"{value * 1e3:.4g} ms"
    shown = f"{value:,.0f}" if value == math.floor(value) else f"{value:,.4g}"
    return f"{shown} {unit}".strip()


def _read(answer: str) -> tuple[float, str]:
    found = _NUMBER.search(answer)
    if found is None:
        raise InvalidParameter("answer", f"must hold a number with its unit, not {answer!r}")
    number = float(re.sub("[,_]", "", found.group()))
    rest = answer[found.end() :].split()
    return number, rest[0].strip(".,;").lower() if rest else ""


def _get_factor(question: Question, unit: str) -> float:
    units = _KINDS.get(question.unit)
    if units is not None:
        if unit not in units:
            raise InvalidParameter("answer", f"needs a unit: one of {', '.join(units)}")
        return units[unit]
    is_word = any(word in unit for word in question.words)
    is_name = not unit or bool(unit.removesuffix("s"))  # a plural, not seconds
    if not is_word and not (is_name and question.unit.lower().startswith(unit.removesuffix("s"))):
        raise InvalidParameter("answer", f"is asked in {question.unit}, not in {unit!r}")
    return 1.0
