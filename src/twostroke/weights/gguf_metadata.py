"""Typed access to a GGUF file's metadata, with errors that name file, key and byte.

It turns "this key must be a positive whole number" into one call, so that whoever reads a model
writes down facts and not checks. It never guesses: a value of another type is refused.
"""

from __future__ import annotations

import math
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.vocabulary import Texts
from twostroke.weights.gguf import ArrayValue, Entry, GGUFFile, ValueType

_Default = TypeVar("_Default", int, float, str)
_LARGEST_SIZE = 2**31 - 1  # positions and sizes are int32 in the kernels


class Metadata:
    """The metadata of one file. A missing key without a default is CorruptModel."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def has(self, key: str) -> bool:
        """True when the file has the key."""
        return key in self.file.entries

    def get_size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to 2^31 - 1."""
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        if entry.type is ValueType.ARRAY:
            hint = "values that differ between layers are not supported"
            raise UnsupportedModel(f"{self.file.path}: key '{key}' is an array; {hint}")
        value = entry.value
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, f"is {entry.type.name}, not a whole number")
        if not least <= value <= _LARGEST_SIZE:
            self.refuse(key, f"is {value}, not from {least} to {_LARGEST_SIZE}")
        return value

    def get_positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        value = entry.value
        if entry.type not in (ValueType.FLOAT32, ValueType.FLOAT64):
            self.refuse(key, f"is {entry.type.name}, not a float")
        assert isinstance(value, float)
        if not (math.isfinite(value) and value > 0):
            self.refuse(key, f"is {value}, not a finite number above zero")
        return value

    def get_text(self, key: str, default: str | None = None) -> str:
        """A string."""
        entry = self._find(key, default)
        if not isinstance(entry, Entry):
            return entry
        if not isinstance(entry.value, str):
            self.refuse(key, f"is {entry.type.name}, not a string")
        return entry.value

    def get_flag(self, key: str, default: bool) -> bool:
        """A bool."""
        entry = self.file.entries.get(key)
        if entry is None:
            return default
        if not isinstance(entry.value, bool):
            self.refuse(key, f"is {entry.type.name}, not a bool")
        return entry.value

    def get_array(self, key: str, *elements: ValueType) -> ArrayValue:
        """An array of one of the given element types, not yet parsed."""
        entry = self._find(key, None)
        assert isinstance(entry, Entry)
        if not isinstance(entry.value, ArrayValue):
            self.refuse(key, f"is {entry.type.name}, not an array")
        if entry.value.element not in elements:
            wanted = " or ".join(each.name for each in elements)
            self.refuse(key, f"holds {entry.value.element.name}, not {wanted}")
        return entry.value

    def get_strings(self, key: str) -> Texts:
        """An array of strings, checked to be UTF-8."""
        return self.file.get_strings(self.get_array(key, ValueType.STRING), key)

    def get_numbers(self, key: str, count: int, *elements: ValueType) -> NDArray[np.generic]:
        """Parse an array of exactly `count` numbers."""
        array = self.get_array(key, *elements)
        if array.count != count:
            self.refuse(key, f"has {array.count} items where {count} are needed")
        return self.file.get_numbers(array)

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise CorruptModel about a key the file has."""
        offset = self.file.entries[key].offset
        raise CorruptModel(f"{self.file.path}: key '{key}' {problem} (byte {offset})")

    def refuse_unsupported(self, key: str, problem: str) -> NoReturn:
        """Raise UnsupportedModel about a key the file has."""
        raise UnsupportedModel(f"{self.file.path}: key '{key}' {problem}")

    def _find(self, key: str, default: _Default | None) -> Entry | _Default:
        """The key's entry, or the default where there is none."""
        entry = self.file.entries.get(key)
        if entry is not None:
            return entry
        if default is None:
            raise CorruptModel(f"{self.file.path}: key '{key}' is missing")
        return default
