"""Typed access to the values of a JSON object, with errors that name file and key.

A value of null counts as absent, as transformers has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from twostroke.errors import CorruptModel, UnsupportedModel


class JsonValues:
    """The values of one object; `prefix` names the object inside its file."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    def has(self, key: str) -> bool:
        """True when the key is there and not null."""
        return self.values.get(key) is not None

    def get_size(
        self, key: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """A whole number within bounds."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(key, f"is {value!r}, not a whole number from {least} to {most}")
        return value

    def get_positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self._find(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, f"is {value!r}, not a number")
        if not 0 < value < math.inf:
            self.refuse(key, f"is {value!r}, not a finite number above zero")
        return self._to_float(key, value)

    def get_flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self._find(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"is {value!r}, not a bool")
        return value

    def get_text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._find(key, default)
        if not isinstance(value, str):
            self.refuse(key, f"is {value!r}, not a string")
        return value

    def get_list(self, key: str) -> list[Any]:
        """A list, its items unchecked."""
        value = self._find(key, None)
        if not isinstance(value, list):
            self.refuse(key, f"is {value!r}, not a list")
        return value

    def get_object(self, key: str) -> JsonValues:
        """An object inside this one."""
        value = self._find(key, None)
        if not isinstance(value, dict):
            self.refuse(key, f"is {value!r}, not an object")
        return JsonValues(self.path, value, f"{self.prefix}{key}.")

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise CorruptModel about a key."""
        raise CorruptModel(f"{self.path}: key '{self.prefix}{key}' {problem}")

    def refuse_unsupported(self, key: str, problem: str) -> NoReturn:
        """Raise UnsupportedModel about a key."""
        raise UnsupportedModel(f"{self.path}: key '{self.prefix}{key}' {problem}")

    def _find(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CorruptModel(f"{self.path}: key '{self.prefix}{key}' is missing")
        return default

    def _to_float(self, key: str, value: int | float) -> float:
        try:
            return float(value)
        except OverflowError:
            self.refuse(key, "is too large")
