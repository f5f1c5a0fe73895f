"""Lengths of prompts and answers: the distributions that a workload can draw from.

Owns what each is called and how it is written ("512", "uniform:100-900", "lognormal:512:1.5", and
"0.5x" for recorded lengths times a factor). A draw takes numbers from the generator it is given
and from nowhere else; every length is at least one token.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twostroke.errors import InvalidParameter

if TYPE_CHECKING:
    from numpy.random import Generator

MAX_LENGTH = 10_000_000
MAX_FACTOR = 1000.0
MAX_CV = 20.0

_WAYS = (
    'a number such as 512, "uniform:100-900", "lognormal:512:1.5" (mean and coefficient of '
    'variation), or with a trace a factor such as "0.5x"'
)
_UNIFORM = re.compile(r"uniform:(\d{1,12})-(\d{1,12})", re.ASCII)
_NUMBER = r"([0-9.eE+-]{1,24}|nan|inf)"
_LOGNORMAL = re.compile(rf"lognormal:{_NUMBER}:{_NUMBER}")
_FACTOR = re.compile(rf"{_NUMBER}x")
_FIXED = re.compile(r"-?\d{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always so many tokens."""

    tokens: int

    @property
    def least(self) -> int:
        """The shortest that can be drawn."""
        return self.tokens

    def draw(self, generator: Generator, count: int) -> list[int]:
        """`count` lengths; draws nothing."""
        return [self.tokens] * count

    def describe(self) -> str:
        """In words."""
        return f"{self.tokens:,} tokens each"


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `least` to `most` as likely."""

    least: int
    most: int

    def draw(self, generator: Generator, count: int) -> list[int]:
        """`count` lengths."""
        drawn: list[int] = generator.integers(self.least, self.most + 1, count).tolist()
        return drawn

    def describe(self) -> str:
        """In words."""
        return f"{self.least:,} to {self.most:,} tokens, each as likely"


@dataclass(frozen=True, slots=True)
class Lognormal:
    """A lognormal length by its mean and coefficient of variation, rounded to whole tokens.

    Prompts and answers of real services are near it (many short, a few very long). The ends, below
    one token and above MAX_LENGTH, are moved to the bounds.
    """

    mean: float
    cv: float

    @property
    def least(self) -> int:
        """The shortest that can be drawn."""
        return 1

    def draw(self, generator: Generator, count: int) -> list[int]:
        """`count` lengths."""
        # Of a lognormal: cv² = exp(sigma²) - 1 and mean = exp(mu + sigma² / 2).
        variance = math.log1p(self.cv**2)
        middle = math.log(self.mean) - variance / 2
        drawn = generator.lognormal(middle, math.sqrt(variance), count)
        lengths: list[int] = drawn.round().clip(1, MAX_LENGTH).astype(int).tolist()
        return lengths

    def describe(self) -> str:
        """In words."""
        return f"lognormal, {self.mean:,g} tokens in the mean, coefficient of variation {self.cv:g}"


@dataclass(frozen=True, slots=True)
class Scaled:
    """Recorded lengths times a factor."""

    factor: float = 1.0

    def scale(self, tokens: int) -> int:
        """A recorded length in this measure, at least one token."""
        return tokens if self.factor == 1.0 else max(1, round(tokens * self.factor))

    def describe(self) -> str:
        """In words."""
        return "as recorded" if self.factor == 1.0 else f"as recorded, times {self.factor:g}"


AS_RECORDED = Scaled()
Lengths = Fixed | Uniform | Lognormal | Scaled


def parse_lengths(parameter: str, text: str) -> Lengths:
    """Lengths as a user writes them; raises InvalidParameter, naming the option `parameter`."""
    if _FIXED.fullmatch(text):
        return Fixed(_check_tokens(parameter, int(text)))
    if match := _UNIFORM.fullmatch(text):
        least, most = (_check_tokens(parameter, int(each)) for each in match.groups())
        if least > most:
            raise InvalidParameter(
                parameter, f"the range {least}-{most} is empty; write uniform:{most}-{least}"
            )
        return Uniform(least, most)
    if match := _LOGNORMAL.fullmatch(text):
        mean = _check_number(parameter, "the mean", match[1], (1.0, float(MAX_LENGTH)))
        return Lognormal(mean, _check_number(parameter, "the variation", match[2], (0.001, MAX_CV)))
    if match := _FACTOR.fullmatch(text):
        return Scaled(_check_number(parameter, "the factor", match[1], (1e-6, MAX_FACTOR)))
    raise InvalidParameter(parameter, f"must be {_WAYS}, not {text!r}")


def _check_tokens(parameter: str, tokens: int) -> int:
    if not 1 <= tokens <= MAX_LENGTH:
        raise InvalidParameter(parameter, f"must be from 1 to {MAX_LENGTH:,} tokens, not {tokens}")
    return tokens


def _check_number(parameter: str, what: str, text: str, bounds: tuple[float, float]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not bounds[0] <= number <= bounds[1]:
        raise InvalidParameter(
            parameter, f"{what} must be from {bounds[0]:g} to {bounds[1]:g}, not {text}"
        )
    return number
