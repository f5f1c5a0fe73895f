"""Claim: one number or formula in circulation, what is right of it, and how we know.

A verdict is one of three words; whatever else is to be said stands in `right`. `derivation` holds
lines of Markdown whose numbers were computed when the page was made.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path

from twostroke.errors import InvalidParameter


class Verdict(enum.Enum):
    """What a claim is."""

    RIGHT = "right"
    CONDITION = "right under a condition"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Claim:
    """An entry of the page."""

    number: int
    title: str
    claim: str
    right: str
    derivation: tuple[str, ...]
    verdict: Verdict
    condition: str = ""

    def __post_init__(self) -> None:
        assert bool(self.condition) == (self.verdict is Verdict.CONDITION)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured before and is kept with the documentation in `docs`."""

    docs: Path

    def get_gpu_step_s(self, model: str, cell: str) -> float:
        """Median time of a step in docs/gpu/results.json, of the first run that has it.

        Raises InvalidParameter where none has.
        """
        results = json.loads((self.docs / "gpu" / "results.json").read_text(encoding="utf-8"))
        for run in results["runs"]:
            for step in run["sections"].get("steps", ()):
                if (step["model"], step["cell"]) == (model, cell):
                    return float(step["seconds"])
        raise InvalidParameter("cell", f"docs/gpu/results.json has no {cell} of {model}")

    def get_log_cell(self, first_cell: str, column: int) -> str:
        """A cell of the table row in docs/log.md whose first cell begins so.

        Raises InvalidParameter where there is none.
        """
        for line in (self.docs / "log.md").read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("|") and cells[0].startswith(first_cell):
                return cells[column]
        raise InvalidParameter("first_cell", f"docs/log.md has no row {first_cell!r}")
