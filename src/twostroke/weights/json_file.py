"""JSON read with suspicion: an object, no name twice, no bottomless nesting.

A repeated name would let two readers of one file see two different models, and Python's parser
answers deep nesting with RecursionError; both become CorruptModel naming the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twostroke.errors import CorruptModel, UnknownModel


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises: UnknownModel if it cannot be read, CorruptModel if it holds anything else.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnknownModel(f"{path}: cannot be read: {reason}") from error
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; `where` begins the message of CorruptModel."""

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise CorruptModel(f"{where}: '{repeated}' appears twice")
        return found

    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{where}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CorruptModel(f"{where}: a JSON object was expected")
    return parsed
